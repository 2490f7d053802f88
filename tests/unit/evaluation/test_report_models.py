"""One table of several models: every number is the one of its file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_grit.cli import main as cli


def write(path: str, value: Any) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(value if isinstance(value, str) else json.dumps(value))


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runs with evaluations inside, a best checkpoint, and files of our verbs, of lm-eval and of mteb."""
    monkeypatch.chdir(tmp_path)
    for name, shift in {"base": 0.0, "sft": 0.1}.items():
        lines = [
            {
                "step": step,
                "loss": 5 - step - shift,
                "lr": 1e-3,
                "seconds": 1.0,
                "tokens": 10,
                "valid_loss": 3.5 + shift,
            }
            | ({"eval/dev/ndcg_at_10": 0.2 * step + shift} if step % 2 == 0 else {})
            for step in (1, 2, 3, 4)
        ]
        write(f"{name}/metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
        for step in (2, 4):
            ndcg = 0.2 * step + shift
            task = {"task": "retrieval", "ndcg_at_10": ndcg, "intervals": {"ndcg_at_10": [ndcg - 0.05, ndcg + 0.05]}}
            write(
                f"{name}/evaluations/step_{step:08d}.json",
                {"step": step, "command": "megatron-grit train", "tasks": {"dev": task}},
            )
        write(f"{name}/checkpoints/step_00000002/state.json", {"step": 2, "command": f"megatron-grit train --x {name}"})
        write(f"{name}/best.json", {"checkpoint": "checkpoints/step_00000002", "step": 2})
        write(
            f"{name}/results/squad.json",
            {"em": 0.25 + shift, "intervals": {"em": [0.2, 0.4]}, "command": f"megatron-grit evaluate qa {name}"},
        )
        write(f"{name}/results/chats.summary.json", {"bleu": 12.5 + shift, "num_equal": 3, "intervals": {}})
        held = {"acc,none": 0.5 + shift, "acc_stderr,none": 0.02, "exact_match,strict-match": 0.125, "alias": "nq"}
        config = {"model": "megatron-grit", "model_args": {"checkpoint": name}}
        write(f"{name}/lm/results_1.json", {"results": {"nq": held}, "config": config})
        scores = {"test": [{"main_score": 0.75 + shift, "hf_subset": "default", "ndcg_at_10": 0.1}]}
        write(f"{name}/mteb/m/1/SciFact.json", {"task_name": "SciFact", "scores": scores, "mteb_version": "2"})
        write(f"{name}/mteb/m/1/model_meta.json", {"name": "m"})
        summary = {
            "model": "m",
            "results": {"SciFact": {"main_score": 0.75 + shift, "type": "Retrieval"}},
            "mean": 0.75,
        }
        write(f"{name}/mteb/scores.json", summary | {"command": f"megatron-grit evaluate mteb {name}"})


def test_numbers_are_those_of_the_files(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", "base", "sft", "--output-dir", "out"]) == 0
    printed = capsys.readouterr().out
    told = json.loads(Path("out/report.json").read_text())
    for name, shift in {"base": 0.0, "sft": 0.1}.items():
        found = {(each["source"], each["task"], each["metric"]): each for each in told[name]["results"]}
        values = {key: each["value"] for key, each in found.items()}
        assert values == pytest.approx(
            {
                ("training", "run", "loss"): 1 - shift,
                ("training", "run", "valid_loss"): 3.5 + shift,
                ("in training", "dev", "ndcg_at_10"): 0.8 + shift,
                ("best", "dev", "ndcg_at_10"): 0.4 + shift,
                ("evaluate", "squad", "em"): 0.25 + shift,
                ("evaluate", "chats", "bleu"): 12.5 + shift,
                ("lm-eval", "nq", "acc"): 0.5 + shift,
                ("lm-eval", "nq", "exact_match,strict-match"): 0.125,
                ("mteb", "SciFact", "main_score"): 0.75 + shift,
            }
        )
        accuracy = found["lm-eval", "nq", "acc"]
        assert accuracy["low"] == pytest.approx(0.5 + shift - 1.959964 * 0.02)
        assert found["lm-eval", "nq", "exact_match,strict-match"]["low"] is None
        assert found["evaluate", "squad", "em"]["high"] == 0.4
        assert accuracy["command"] == f"lm_eval --model megatron-grit --model_args checkpoint={name} --tasks nq"
    page = Path("out/report.md").read_text()
    assert printed.strip() in page
    for row in (
        "|  | step | 4 | 4 |",
        "| dev | ndcg_at_10 | 0.800 [0.750, 0.850] | 0.900 [0.850, 0.950] |",
        "| squad | em | 0.250 [0.200, 0.400] | 0.350 [0.200, 0.400] |",
        "| nq | acc | 0.500 [0.461, 0.539] | 0.600 [0.561, 0.639] |",
        "| SciFact | main_score | 0.750 | 0.850 |",
        "- training: `megatron-grit train --x sft`",
        "- results/squad.json: `megatron-grit evaluate qa base`",
        "- mteb/m/1/SciFact.json: `megatron-grit evaluate mteb sft`",
    ):
        assert row in page, row
    for picture in ("loss.png", "figures.png"):
        assert (Path("out") / picture).read_bytes().startswith(b"\x89PNG") and f"]({picture})" in page


def test_files_and_folders_of_results_are_models_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", "base/results/squad.json", "base/results", "sft/results", "--output-dir", "out"]) == 0
    printed = capsys.readouterr().out  # two are named results
    assert "| task | metric | squad.json | base/results | sft/results |" in printed
    assert "| squad | em | 0.250 [0.200, 0.400] | 0.250 [0.200, 0.400] | 0.350 [0.200, 0.400] |" in printed


def test_what_was_measured_in_another_way_has_a_row_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    """Of our verbs another layer or other data, of lm-eval's other examples or documents."""

    def ours(value: float, **told: Any) -> dict[str, Any]:
        return {"spearman": value, "pearson": value, "intervals": {"spearman": [0, 1], "pearson": [0, 1]}, **told}

    def harness(value: float, shots: int, documents: int) -> dict[str, Any]:
        told = {"n-shot": {"nq": shots}, "n-samples": {"nq": {"original": 90, "effective": documents}}}
        return {"results": {"nq": {"acc,none": value}}, **told}

    write("one/sts.json", ours(0.5, num_pairs=9))
    write("two/sts.json", ours(0.25, num_pairs=9, layer=0))
    write("three/sts.json", ours(0.75, num_pairs=9, num_queries=5))  # with retrieval, in the same file
    for name, shots, documents in (("one", 0, 90), ("two", 5, 90), ("three", 0, 8)):
        write(f"{name}/results_1.json", harness(0.5, shots, documents))
    assert cli.main(["report", "one", "two", "three", "--output-dir", "out"]) == 0
    printed = capsys.readouterr().out
    rows = [line for line in printed.splitlines() if line.startswith(("| sts", "| nq"))]
    assert rows == [
        "| sts | spearman | 0.500 [0.000, 1.000] |  | 0.750 [0.000, 1.000] |",
        "| sts (layer 0) | spearman |  | 0.250 [0.000, 1.000] |  |",
        "| sts | pearson | 0.500 [0.000, 1.000] |  | 0.750 [0.000, 1.000] |",
        "| sts (layer 0) | pearson |  | 0.250 [0.000, 1.000] |  |",
        "| nq (shots 0, num_documents 90) | acc | 0.500 |  |  |",
        "| nq (shots 5, num_documents 90) | acc |  | 0.500 |  |",
        "| nq (shots 0, num_documents 8) | acc |  |  | 0.500 |",
    ]
    told = json.loads(Path("out/report.json").read_text())["two"]["results"]
    assert [each["measured"] for each in told if each["task"] == "sts"] == [{"layer": 0, "num_pairs": 9}] * 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "nowhere: is neither a folder nor a file of results"),
        (["base", "base/../base"], "is given twice"),
        (["base/mteb/m/1/model_meta.json"], "model_meta.json: holds no figures of evaluate, lm-eval or mteb"),
        (["empty"], "empty: holds no metrics.jsonl, and no results of"),
        (["twice"], "twice: has acc of nq in a.json and in b.json; remove one"),
        (["damaged"], "damaged/a.json: cannot be read as JSON"),
        ([], "give the models: output directories of runs"),
        (["base", "--before", "b.json"], "--before is of the report of one run; leave it out, or the models"),
        (["--before", "b.json"], "--after, --metrics, --timings must be given with --before"),
    ],
)
def test_bad_input_is_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("empty").mkdir()
    for name in ("a", "b"):
        write(f"twice/{name}.json", {"results": {"nq": {"acc,none": 0.5}}})
    write("damaged/a.json", "{")
    assert cli.main(["report", *words, "--output-dir", "out"]) != 0
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
