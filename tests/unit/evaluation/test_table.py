"""Groups of tasks of several models, from files of ours and of lm-eval's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_grit.cli import main as cli

GROUPS = """
Reading: {squad2: f1, quoref: f1}
Closed book: {nq: em}
Translation: {wmt14: {metric: ter, scale: 0.01}}
"""
FIGURES = {"base": [0.2, 0.4, 0.1, 80.0], "sft_1": [0.6, 0.5, 0.3, 60.0]}
COMMAND = "evaluate table --models base sft_1 --groups groups.yaml".split()


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two models, with scores of answers and a file of lm-eval's."""
    monkeypatch.chdir(tmp_path)
    for model, (squad2, quoref, nq, ter) in FIGURES.items():
        write(f"{model}/squad2.json", {"f1": squad2, "em": 0.0, "intervals": {"f1": [0, 1]}})
        write(f"{model}/quoref.json", {"f1": quoref})
        held = {"nq": {"em,none": nq, "em_stderr,none": 0.01}, "wmt14": {"ter,none": ter}}
        write(f"{model}/lm_eval/results_1.json", {"results": held})
    Path("groups.yaml").write_text(GROUPS)


def write(path: str, value: Any) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(value if isinstance(value, str) else json.dumps(value))


def test_a_task_weighs_the_same_in_its_group_and_a_group_in_the_mean(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*COMMAND, "--output", "table.json"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "| model | Reading | Closed book | Translation | mean |",
        "|---|---|---|---|---|",
        "| base | 0.300 | 0.100 | **0.800** | 0.400 |",
        "| sft_1 | **0.550** | **0.300** | 0.600 | **0.483** |",
    ]
    table = json.loads(Path("table.json").read_text())
    assert table["groups"]["base"] == pytest.approx({"Reading": 0.3, "Closed book": 0.1, "Translation": 0.8})
    assert table["means"] == pytest.approx({"base": 1.2 / 3, "sft_1": 1.45 / 3})  # of 4 tasks it would be 0.375, 0.5
    assert table["tasks"]["sft_1"]["wmt14"] == pytest.approx(0.6)


def test_tasks_that_were_not_measured_alike_are_warned_of(capsys: pytest.CaptureFixture[str]) -> None:
    for model, (_, _, nq, ter) in FIGURES.items():
        held = {"nq": {"em,none": nq}, "wmt14": {"ter,none": ter}}
        shots = {"nq": 5 if model == "base" else 0, "wmt14": 2}
        write(f"{model}/lm_eval/results_1.json", {"results": held, "n-shot": shots})
    write("base/squad2.json", {"f1": 0.2, "scorer": "squad2", "num_questions": 9})
    write("sft_1/squad2.json", {"f1": 0.6, "scorer": "squad2", "num_questions": 8})
    assert cli.main(COMMAND) == 0
    told = [line.partition(" ")[2] for line in capsys.readouterr().err.splitlines()]
    assert told == [
        "squad2 was not measured alike (base: num_questions 9; sft_1: num_questions 8)",
        "nq was not measured alike (base: shots 5; sft_1: shots 0)",
    ]


def test_of_files_of_the_harness_in_one_folder_the_newest_counts(capsys: pytest.CaptureFixture[str]) -> None:
    write("base/lm_eval/results_2.json", {"results": {"nq": {"em,none": 0.7}}})
    write("base/lm_eval/results_0.json", {"results": {"nq": {"em,none": 0.9}, "wmt14": {"ter,none": 1.0}}})
    assert cli.main([*COMMAND, "--output", "table.json"]) == 0
    tasks = json.loads(Path("table.json").read_text())["tasks"]["base"]
    assert (tasks["nq"], tasks["wmt14"]) == (0.7, pytest.approx(0.8))
    capsys.readouterr()
    write("base/lm_eval/part/results_3.json", {"results": {"nq": {"em,none": 0.7}}})
    assert cli.main(COMMAND) == 2
    assert (
        "em of task nq is in lm_eval/part/results_3.json and lm_eval/results_2.json; remove one"
        in capsys.readouterr().err
    )


def test_latex(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*COMMAND, "--latex"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == r"\begin{tabular}{lrrrr}" and lines[-1] == r"\end{tabular}"
    assert lines[3] == r"sft\_1 & \textbf{0.550} & \textbf{0.300} & 0.600 & \textbf{0.483} \\"


@pytest.mark.parametrize(
    ("path", "content", "message"),
    [
        ("groups.yaml", "Reading: {squad3: f1}", "base: has no f1 of task squad3: no squad3.json, and no file"),
        ("groups.yaml", "Reading: {squad2: rouge}", "base: has no rouge of task squad2"),
        ("groups.yaml", "Reading: {squad2: f1}\nMore: {squad2: em}", "groups.yaml: task squad2 is in two groups"),
        ("groups.yaml", "Reading: squad2", "groups.yaml: give groups as GROUP: {TASK: METRIC}"),
        ("groups.yaml", "Reading: {squad2: {metric: f1, scale: x}}", "task squad2 has {'metric': 'f1', 'scale': 'x'}"),
        ("groups.yaml", "- squad2", "groups.yaml: give groups as"),
        ("groups.yaml", "Reading: {squad2: f1", "groups.yaml:"),
        ("base/squad2.json", "{", "base/squad2.json: cannot be read as JSON"),
        ("base/squad2.json", {"f1": None}, "base/squad2.json: f1 of task squad2 is None and no number"),
        (
            "base/more/squad2.json",
            {"f1": 1.0},
            "base: f1 of task squad2 is in more/squad2.json and squad2.json; remove one",
        ),
        (
            "base/lm_eval/results_1.json",
            {"results": {"nq": {"em,none": 1, "em,strict": 0}, "wmt14": {"ter,none": 1}}},
            "task nq has em,none, em,strict; give one of them whole",
        ),
    ],
)
def test_mistakes_are_one_line(path: str, content: Any, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    write(path, content)
    assert cli.main(COMMAND) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1


def test_folders(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main("evaluate table --models base other/base --groups groups.yaml".split()) == 2
    assert "two folders are named base" in capsys.readouterr().err
    assert cli.main("evaluate table --models base nothing --groups groups.yaml".split()) == 2
    assert "nothing: is no folder of results" in capsys.readouterr().err
    assert cli.main("evaluate table --models base --groups nothing.yaml".split()) == 2
    assert "nothing.yaml" in capsys.readouterr().err
