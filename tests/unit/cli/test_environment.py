"""What the environment brings to a command: a launcher's variables, streams that are closed or narrow."""

from __future__ import annotations

import io
import os
import sys

import pytest

from megatron_grit.cli import main as cli
from megatron_grit.config.checks import run as run_checks
from megatron_grit.config.schema import RunConfig
from megatron_grit.errors import ConfigError
from megatron_grit.parallel import rendezvous
from megatron_grit.store import environment
from megatron_grit.store.logs import configure_logging, get_logger
from megatron_grit.store.progress import Progress
from tests.harness.command import cli as run

JOB = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
BROKEN = [
    ({"RANK": "3"}, "RANK is 3, but WORLD_SIZE is not set"),
    ({"WORLD_SIZE": "4"}, "WORLD_SIZE is 4, but RANK is not set"),
    (JOB | {"RANK": "2"}, "RANK is 2, but WORLD_SIZE is 2"),
    (JOB | {"RANK": "-1"}, "RANK must be an integer of at least 0, not '-1'"),
    (JOB | {"RANK": "one"}, "RANK must be an integer of at least 0, not 'one'"),
    (JOB | {"RANK": "²"}, "RANK must be an integer of at least 0, not '²'"),
    (JOB | {"WORLD_SIZE": "0"}, "WORLD_SIZE must be an integer of at least 1, not '0'"),
    (JOB | {"WORLD_SIZE": "9" * 5000}, "WORLD_SIZE must be an integer of at least 1"),
    (JOB | {"LOCAL_RANK": "gpu0"}, "LOCAL_RANK must be an integer of at least 0, not 'gpu0'"),
    (JOB | {"LOCAL_RANK": "4", "LOCAL_WORLD_SIZE": "4"}, "LOCAL_RANK is 4, but LOCAL_WORLD_SIZE is 4"),
    (JOB | {"RANK": "0", "MASTER_ADDR": ""}, "RANK is 0 and WORLD_SIZE 2, but MASTER_ADDR is not set"),
    (JOB | {"RANK": "0", "MASTER_PORT": ""}, "RANK is 0 and WORLD_SIZE 2, but MASTER_PORT is not set"),
    (JOB | {"RANK": "0", "MASTER_PORT": "70000"}, "MASTER_PORT must be an integer from 1 to 65535, not '70000'"),
]


@pytest.fixture(autouse=True)
def no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in environment._VARIABLES:
        monkeypatch.setenv(name, "")  # so that what a command removes comes back


@pytest.mark.parametrize(("variables", "message"), BROKEN)
def test_a_broken_job_is_one_line_and_a_verb_alone_runs_on(
    variables: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cli.guarded(environment.check_job, "train", joins_job=True) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"train: error: {message}") and len(error.splitlines()) == 1
    assert cli.guarded(environment.check_job, "plan") == 0
    error = capsys.readouterr().err
    assert f"runs alone: {message}" in error and len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        ({}, (0, 1)),
        (JOB, (1, 2)),
        ({"RANK": "0"}, (0, 1)),
        ({"RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": "x"}, (0, 1)),
        ({"SLURM_PROCID": "3", "SLURM_NTASKS": "4"}, (0, 1)),
    ],
)
def test_a_whole_job_and_none_are_taken(
    variables: dict[str, str], place: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert environment.leave_job() is None
    assert (environment.job_rank(), environment.job_size()) == place


def test_a_check_for_n_processes_needs_no_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "16")
    assert environment.planned_size() == 16
    monkeypatch.setenv("WORLD_SIZE", "many")
    with pytest.raises(ConfigError, match="WORLD_SIZE must be an integer"):
        environment.planned_size()


def test_an_address_that_does_not_resolve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "_SECONDS_FOR_A_NAME", 0.0)
    with pytest.raises(ConfigError, match="MASTER_ADDR 'no..name' is no address"):
        rendezvous._check_address("no..name")
    rendezvous._check_address("127.0.0.1")


def test_a_port_that_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket
    from datetime import timedelta

    with socket.create_server(("127.0.0.1", 0)) as taken:
        for name, value in (JOB | {"RANK": "0", "MASTER_PORT": str(taken.getsockname()[1])}).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(ConfigError, match=r"MASTER_PORT \d+ is taken on this node"):
            rendezvous.join_job(timedelta(seconds=2))


def test_a_broken_pipe_of_something_else_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise BrokenPipeError(32, "Broken pipe")

    assert cli.guarded(fail, "tool") == 1
    assert "BrokenPipeError" in capsys.readouterr().err


def test_a_narrow_output_escapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Letters that ASCII does not have, and names of files that are no UTF-8."""
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    assert cli.guarded(lambda: print("caf\u00e9 " + os.fsdecode(b"\xff.txt"))) == 0
    assert raw.getvalue() == b"caf\\xe9 \\udcff.txt\n"


def test_closed_streams_and_those_without_a_descriptor(monkeypatch: pytest.MonkeyPatch) -> None:
    class Cell:
        """What a notebook has for a stream, at the least."""

        def write(self, text: str) -> int:
            return len(text)

        def flush(self) -> None: ...

    for stream in (None, Cell()):
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr(sys, "stderr", stream)
        with Progress(2, "work", "row") as bar:
            bar.update(1)
        assert cli.guarded(lambda: print("said")) == 0


def test_train_says_it_before_it_loads_anything() -> None:
    result = run(["-m", "megatron_grit.cli.train", "--model", "tiny_mistral"], env={"RANK": "3", "WORLD_SIZE": "3"})
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1
    assert "error: RANK is 3, but WORLD_SIZE is 3" in result.stderr


def test_a_message_stands_above_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    configure_logging()
    with Progress(4, "work", "row") as bar:
        bar.update(1)
        get_logger("megatron_grit.test").warning("said meanwhile")
    line = next(line for line in terminal.getvalue().split("\n") if "said meanwhile" in line)
    assert "work" not in line.rpartition("\r")[2]


def test_a_logger_that_is_not_installed_and_a_place_that_is_not_writable(monkeypatch: pytest.MonkeyPatch) -> None:
    config = RunConfig()
    config.logging.wandb_project, config.logging.tensorboard, config.output_dir = "p", True, "/"
    monkeypatch.setattr(run_checks, "find_spec", lambda package: None)
    monkeypatch.setattr(run_checks.os, "access", lambda path, mode: False)
    problems = {problem.key: problem.message for problem in run_checks._files(config)}
    assert problems["logging.wandb_project"].endswith("needs the wandb package: pip install wandb")
    assert problems["logging.tensorboard"].endswith("needs the tensorboard package: pip install tensorboard")
    assert problems["output_dir"] == "output_dir: / is not writable; give another output_dir"
