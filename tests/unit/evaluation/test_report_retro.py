from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_grit.errors import DataError
from megatron_grit.evaluation.report_retro import write_retro_report

BUCKETS = {"none": (6.0, 100), "to_0.125": (5.0, 300), "to_0.25": (4.5, 0), "to_0.5": (4.0, 50), "to_1": (3.0, 150)}


def write_run(folder: Path, loss: float, *, by_overlap: bool, gain: float = 0.0) -> None:
    """metrics.jsonl as training with data.valid writes it: three steps, and a validation after the last."""
    valid: dict[str, Any] = {"step": 3, "valid_loss": loss, "valid_tokens": 600}
    if by_overlap:
        valid |= {"valid_loss_without_copies": 5.25 - gain, "valid_tokens_without_copies": 400}
        for name, (value, tokens) in BUCKETS.items():
            if tokens:
                valid |= {f"valid_loss_overlap/{name}": value - gain, f"valid_tokens_overlap/{name}": tokens}
    lines = [{"step": step, "loss": 7.0 - step, "tokens": 100} for step in (1, 2, 3)]
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*lines, valid]))


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, Path]:
    write_run(tmp_path / "gpt", 4.5, by_overlap=False)
    write_run(tmp_path / "beside", 4.50001, by_overlap=True)
    write_run(tmp_path / "retro", 4.25, by_overlap=True, gain=0.25)
    write_run(tmp_path / "shuffled", 4.625, by_overlap=True)
    checkpoint = tmp_path / "retro" / "checkpoints" / "step_00000003"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text(json.dumps({"format": 1, "step": 3, "world_size": 2}))
    scores = {"em": 0.25, "f1": 0.5, "num_questions": 40, "intervals": {"em": [0.125, 0.375], "f1": [0.4, 0.6]}}
    (tmp_path / "scores.json").write_text(json.dumps(scores))
    (tmp_path / "timings.tsv").write_text("setup\t40.5\nretro\t3.0\nsft\t100.25\n")
    names = {"gpt": "gpt", "gpt_by_overlap": "beside", "retro": "retro", "retro_shuffled": "shuffled"}
    names |= {"scores": "scores.json", "timings": "timings.tsv"}
    return {key: tmp_path / name for key, name in names.items()}


def test_files_and_keys(tmp_path: Path, inputs: dict[str, Path]) -> None:
    samples = tmp_path / "samples.txt"
    samples.write_text("Who?\nNobody.\n")
    table = write_retro_report(tmp_path / "out", **inputs, samples=samples)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["arms"] == {"gpt": 4.5, "retro": 4.25, "retro_shuffled": 4.625}
    assert report["without_copies"] == {"gpt": 5.25, "retro": 5.0}
    seen = {name: value for name, (value, tokens) in BUCKETS.items() if tokens}
    assert report["by_overlap"] == {"gpt": seen, "retro": {name: value - 0.25 for name, value in seen.items()}}
    assert report["tokens_by_overlap"] == {name: tokens for name, (_, tokens) in BUCKETS.items() if tokens}
    assert (report["em"], report["f1"], report["num_questions"]) == (0.25, 0.5, 40)
    assert report["seconds"] == 103.25 and report["setup_seconds"] == 40.5
    assert (report["world_size"], report["steps"], report["tokens"]) == (2, 3, 300)
    assert "| Retro | 4.250 | 5.750 | 4.750 | 3.750 | 2.750 |" in table
    assert (
        "| GPT | 4.500 | 6.000 | 5.000 | 4.000 | 3.000 |" in table
        and "| tokens | 600 | 100 | 300 | 50 | 150 |" in table
    )
    assert "| Retro, neighbors of other chunks | 4.625 |  |  |  |  |" in table
    assert "| 40 | 0.250 [0.125, 0.375] | 0.500 [0.400, 0.600] |" in table
    markdown = (tmp_path / "out" / "report.md").read_text()
    assert table in markdown and "Nobody." in markdown and "take +0.250 nats off" in markdown and "-0.125" in markdown
    for name in ("loss.png", "overlap.png"):
        assert name in markdown and (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG\r\n")


def test_other_weights_are_refused(tmp_path: Path, inputs: dict[str, Path]) -> None:
    write_run(tmp_path / "others", 4.6, by_overlap=True)
    with pytest.raises(DataError, match="others/metrics.jsonl: says a loss of 4.6000 and not 4.5000"):
        write_retro_report(tmp_path / "out", **inputs | {"gpt_by_overlap": tmp_path / "others"})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gpt/metrics.jsonl", '{"step": 1, "loss": 7.0}\n', "has no valid_loss; train with data.valid"),
        ("scores.json", "{}", "run megatron-grit evaluate qa again"),
        ("scores.json", '{"em": 1, "f1": 1, "num_questions": 2, "intervals": {"em": [0, 1]}}', "evaluate qa again"),
    ],
)
def test_what_is_missing_is_named(
    tmp_path: Path, inputs: dict[str, Path], name: str, content: str, message: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message) as error:
        write_retro_report(tmp_path / "out", **inputs)
    assert name in str(error.value) and not (tmp_path / "out").exists()


def test_a_model_that_was_not_measured_by_overlap(tmp_path: Path, inputs: dict[str, Path]) -> None:
    with pytest.raises(DataError, match="gpt/metrics.jsonl: has no losses by overlap"):
        write_retro_report(tmp_path / "out", **inputs | {"gpt_by_overlap": inputs["gpt"]})
