"""Commands end with the right status and never with a traceback."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from operator import attrgetter
from pathlib import Path

import pytest

from megatron_grit.cli import main as cli
from megatron_grit.cli import train
from megatron_grit.config.checks.run import find_problems
from megatron_grit.config.kinds import kind_names, kind_options
from megatron_grit.config.parse import parse_run_config, save_config
from megatron_grit.config.schema import RunConfig
from megatron_grit.errors import DataError
from megatron_grit.parallel import failures

GOOD = ["--model", "tiny_mistral", "--data.embedding=[e]", "--data.generative=[g]", "--data.tokenizer=t"]


def test_verbs_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert "train            Train a model" in text
    assert cli.main([]) == 2
    assert all(cli.summary(path).endswith(".") for path in cli.verbs().values())


def test_unknown_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["tran"]) == 2
    assert capsys.readouterr().err == "megatron-grit: error: unknown verb 'tran' (did you mean train?)\n"


def test_print_config_is_a_configuration(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["train", *GOOD, "--print_config"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("# 1 process = tensor 1 x pipeline 1 x data 1\n")
    (tmp_path / "config.yaml").write_text(printed)
    assert cli.main(["train", "--config", str(tmp_path / "config.yaml"), "--print_config"]) == 0
    assert capsys.readouterr().out == printed


def test_dry_run_looks_for_files(capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main([*GOOD, "--dry-run"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == (
        "megatron-grit: error: command line: data.embedding: there is no file e.idx; "
        "make it with megatron-grit build-grit"
    )
    assert len(lines) == 3


@pytest.mark.parametrize("kind", kind_names())
def test_a_file_that_is_not_there_is_made_by_the_tool_of_its_kind(kind: str) -> None:
    key, made_by = kind_options(kind).DATA, kind_options(kind).MADE_BY
    config = RunConfig()
    config.training.objective = kind  # type: ignore[assignment]
    missing = next(problem.message for problem in find_problems(config, 1) if problem.key == key)
    assert missing.startswith(f"training.objective {kind} needs {key}: the prefix of a file made by {made_by}; ")
    attrgetter(key)(config).append("nowhere")
    config.data.tokenizer = "t"
    missing = next(problem.message for problem in find_problems(config, 1) if problem.key == key)
    assert missing == f"{key}: there is no file nowhere.idx; make it with {made_by}"
    named = set(re.findall(r"(?:build|preprocess)-\w+", made_by))
    assert named and named <= set(cli.verbs())


def test_dry_run_tells_everything_that_is_wrong(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    given = ["--parallel.tensor", "3", "--checkpoint.load", "nowhere", "--output_dir", str(tmp_path / "file")]
    given += ["--model.num_query_groups", "3", "--optimizer.min_lr", "1"]
    assert train.main([*GOOD, *given, "--dry-run"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith("megatron-grit: error: command line: ") for line in lines)
    for message in (
        "optimizer.min_lr 1.0 is above optimizer.lr",
        "data.embedding: there is no file e.idx",
        "data.generative: there is no file g.idx",
        "data.tokenizer: there is no file t",
        "checkpoint.load: there is no directory nowhere",
        "is a file, not a directory",
    ):
        assert sum(message in line for line in lines) == 1, lines
    assert len(lines) == 6
    assert train.main([*GOOD, *given]) == 2
    assert capsys.readouterr().err.splitlines() == lines[:1], "a run stops at the first"
    assert train.main([*GOOD, "--parallel.tensor", "3", "--loss.num_blocks", "7", "--dry-run"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert "is no multiple of tensor 3" in lines[0] and len(lines) > 3


def test_a_finished_run_says_so(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before torch is loaded, with how to go on; one of more steps, afresh or that only measures goes on."""
    monkeypatch.setattr(train, "find_problems", lambda *_, **__: [])
    monkeypatch.setattr(train, "say_loading", lambda: 1 // 0)
    for step in (3, 10):
        (tmp_path / "checkpoints" / f"step_{step:08d}").mkdir(parents=True)
        (tmp_path / "checkpoints" / f"step_{step:08d}" / "state.json").touch()
        saved = parse_run_config(GOOD)
        save_config(saved, tmp_path / "checkpoints" / f"step_{step:08d}" / "config.yaml")
    given = [*GOOD, "--output_dir", str(tmp_path), "--training.steps"]
    for steps in ("10", "4"):
        assert train.main([*given, steps]) == 0
        line = (
            f"{tmp_path} is finished: its newest checkpoint is of step 10, and training.steps is {steps}. Nothing to do"
        )
        error = capsys.readouterr().err
        assert line in error and len(error.splitlines()) == 1
    assert train.main([*given, "10", "--model.num_layers", "3"]) == 2, "as a run that is not finished"
    assert "was trained with model.num_layers 2, and this run has 3; choose" in capsys.readouterr().err
    for more in (["11"], ["10", "--checkpoint.resume", "false"], ["10", "--training.skip_train", "true"]):
        assert train.main([*given, *more]) == 1 and "ZeroDivisionError" in capsys.readouterr().err


def test_a_restart_by_the_launcher_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "TORCHELASTIC_MAX_RESTARTS": "3"}.items():
        monkeypatch.setenv(name, value)
    for count, told in (("0", ""), ("2", "restart 2 of 3"), ("x", "")):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", count)
        assert cli.guarded(lambda: None, joins_job=True) == 0
        error = capsys.readouterr().err
        assert told in error and bool(error) == bool(told)


@pytest.mark.parametrize(("rank", "speaker"), [("0", "error: command line"), ("1", "error: [rank 1] command line")])
def test_errors_are_one_line(rank: str, speaker: str, repository: Path) -> None:
    """Rank 1 speaks late: a launcher would have ended it by then, had rank 0 the same to say."""
    began = time.monotonic()
    result = subprocess.run(
        [sys.executable, "-m", "megatron_grit.cli.train", *GOOD, "--parallel.tensor", "2"],
        env=os.environ | {"RANK": rank, "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"},
        cwd=repository,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1 and speaker in result.stderr
    if rank == "1":
        assert time.monotonic() - began > failures._SECONDS_FOR_THE_FIRST
    assert "Traceback" not in result.stderr and result.stdout == ""


def test_guarded(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(error: BaseException) -> None:
        raise error

    assert cli.guarded(lambda: None) == 0
    assert cli.guarded(lambda: fail(DataError("empty text", path="a.jsonl", line=3)), "tool") == 2
    assert capsys.readouterr().err == "tool: error: a.jsonl:3: empty text\n"
    assert cli.guarded(lambda: fail(FileNotFoundError(2, "No such file", "a.txt")), "tool") == 2
    assert capsys.readouterr().err == "tool: error: [Errno 2] No such file: 'a.txt'\n"
    assert cli.guarded(lambda: fail(KeyboardInterrupt()), "tool", resumes=True) == 130
    assert capsys.readouterr().err == "tool: interrupted; the same command resumes\n"
    assert cli.guarded(lambda: fail(ZeroDivisionError("a defect"))) == 1
    error = capsys.readouterr().err
    assert error.startswith("Traceback") and error.endswith("ZeroDivisionError: a defect\n")
