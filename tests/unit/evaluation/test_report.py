from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_grit.errors import DataError
from megatron_grit.evaluation.report import read_metrics, read_timings, write_report


def evaluation(recall: float, loss: float, **changes: object) -> dict:
    return {
        "step": 3,
        "world_size": 2,
        "recall_at_1": recall / 3,
        "recall_at_10": recall,
        "ndcg_at_10": recall / 2,
        "lm_loss": loss,
        "intervals": {
            "recall_at_1": [0.0, 1.0],
            "recall_at_10": [recall - 0.05, recall + 0.05],
            "ndcg_at_10": [0.0, 1.0],
            "lm_loss": [loss - 0.1, loss + 0.1],
        },
        "chance_recall_at_1": 0.01,
        "chance_recall_at_10": 0.1,
        "num_queries": 100,
        "num_passages": 100,
    } | changes


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, Path]:
    (tmp_path / "before.json").write_text(json.dumps(evaluation(0.2, 7.5)))
    (tmp_path / "after.json").write_text(json.dumps(evaluation(0.5, 5.0)))
    lines = [{"step": i, "loss_emb": 5.0 - i, "loss_gen": 7.0 - i, "tokens": 100} for i in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "timings.tsv").write_text("setup\t40.5\ncorpus\t3.0\ntrain\t100.25\n")
    names = {"before": "before.json", "after": "after.json", "metrics": "metrics.jsonl", "timings": "timings.tsv"}
    return {key: tmp_path / name for key, name in names.items()}


def test_files_and_keys(tmp_path: Path, inputs: dict[str, Path]) -> None:
    samples = tmp_path / "samples.txt"
    samples.write_text("What does it do?\nIt does.\n")
    table = write_report(tmp_path / "out", **inputs, samples=samples)
    report = json.loads((tmp_path / "out/report.json").read_text())
    for side, recall, loss in (("before", 0.2, 7.5), ("after", 0.5, 5.0)):
        figures = {key: value for key, value in report[side].items() if key != "intervals"}
        assert figures == {"recall_at_1": recall / 3, "recall_at_10": recall, "ndcg_at_10": recall / 2, "lm_loss": loss}
        assert report[side]["intervals"]["recall_at_10"] == [recall - 0.05, recall + 0.05]
    assert report["chance_recall_at_10"] == 0.1
    assert report["seconds"] == 103.25 and report["setup_seconds"] == 40.5
    assert report["world_size"] == 2 and report["tokens"] == 300
    assert report["lm_loss_drop"] == 2.5 and report["recall_at_10_intervals_overlap"] is False
    assert "| recall@10 | 0.100 | 0.200 [0.150, 0.250] | 0.500 [0.450, 0.550] |" in table
    markdown = (tmp_path / "out/report.md").read_text()
    assert table in markdown and "It does." in markdown and "loss.png" in markdown
    assert (tmp_path / "out/loss.png").read_bytes().startswith(b"\x89PNG\r\n")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["loss.png", "report.json", "report.md"]


def test_overlapping_intervals_are_called_so(tmp_path: Path, inputs: dict[str, Path]) -> None:
    inputs["after"].write_text(json.dumps(evaluation(0.25, 5.0)))
    write_report(tmp_path / "out", **inputs)
    assert json.loads((tmp_path / "out/report.json").read_text())["recall_at_10_intervals_overlap"] is True


def test_figure_missing_from_an_evaluation(tmp_path: Path, inputs: dict[str, Path]) -> None:
    incomplete = evaluation(0.2, 7.5)
    del incomplete["intervals"]["lm_loss"]
    inputs["before"].write_text(json.dumps(incomplete))
    with pytest.raises(DataError, match="before.json: has no lm_loss"):
        write_report(tmp_path / "out", **inputs)
    assert not (tmp_path / "out").exists()


def test_metrics_of_a_resumed_run(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 3}\n{"step": 2, "loss": 2}\n{"step": 2, "loss": 1}\n')
    assert read_metrics(path) == [{"step": 1, "loss": 3}, {"step": 2, "loss": 1}]


@pytest.mark.parametrize("line", ["{", "[]", '{"loss": 1}', '{"step": "x"}'])
def test_bad_metrics_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n')
    with pytest.raises(DataError, match="metrics.jsonl:2"):
        read_metrics(path)


def test_empty_or_missing_metrics(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with pytest.raises(DataError, match="no such input file"):
        read_metrics(path)
    path.write_text("")
    with pytest.raises(DataError, match="holds no metrics"):
        read_metrics(path)


def test_timings(tmp_path: Path) -> None:
    path = tmp_path / "timings.tsv"
    path.write_text("train\t5\nbuild files\t2\ntrain\t7.5\n")
    assert read_timings(path) == {"train": 12.5, "build files": 2}
    path.write_text("train 5\n")
    with pytest.raises(DataError, match="timings.tsv:1"):
        read_timings(path)
