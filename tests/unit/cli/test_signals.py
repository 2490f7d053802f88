"""Signals and outputs that nobody reads end every verb alike: one line, the status of a shell, nothing half written."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from megatron_grit.cli import main as cli
from megatron_grit.cli import train
from megatron_grit.store.files import replacing
from tests.unit.cli.test_help import VERBS, module_of

RESUMES = {
    "build-db",
    "build-grit",
    "build-preference",
    "build-sft",
    "convert",
    "encode",
    "evaluate answers",
    "evaluate lm",
    "evaluate mteb",
    "evaluate rerank",
    "evaluate retrieval",
    "generate-qa",
    "mine-negatives",
    "preprocess-data",
    "rag build",
    "rag eval",
    "rollouts",
    "teacher-logits",
    "weight-diff",
}


def run_verb(verb: str, work: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> int:
    """The status of a verb that does this in place of what it does."""
    if verb == "train":
        monkeypatch.setattr(train, "parse_train_arguments", lambda argv: work())
        return train.main([])
    monkeypatch.setattr(cli, "parse_command", lambda *_, **__: work())
    return int(module_of(verb).main([]))


def plain(number: int) -> None:
    signal.raise_signal(number)


def as_a_broken_import(number: int) -> None:
    """As numpy and tqdm do, a signal's exception is replaced by another one."""
    try:
        signal.raise_signal(number)
    except KeyboardInterrupt as error:
        assert type(error) is not KeyboardInterrupt, (
            "Python would end the process by SIGINT where exec() is left by one"
        )
        raise ImportError("numpy is broken") from error


@pytest.mark.parametrize("verb", ["train", *VERBS])
@pytest.mark.parametrize(("number", "status", "word"), [(2, 130, "interrupted"), (15, 143, "terminated")])
@pytest.mark.parametrize("how", [plain, as_a_broken_import])
def test_a_signal_is_one_line(
    verb: str,
    number: int,
    status: int,
    word: str,
    how: Callable[[int], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What is half written is removed, and signals act as before once the command is over."""
    before = {each: signal.getsignal(each) for each in (2, 15)}

    def work() -> None:
        with replacing(tmp_path / "out") as file:
            file.write("half")
            how(number)

    assert run_verb(verb, work, monkeypatch) == status
    out, error = capsys.readouterr()
    assert not out and len(error.splitlines()) == 1
    assert error.endswith(f": {word}{'; the same command resumes' if verb in RESUMES else ''}\n"), error
    assert list(tmp_path.iterdir()) == [] and before == {each: signal.getsignal(each) for each in before}


def test_a_command_that_ends_in_spite_of_a_signal_has_its_own_status(capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        print("done")

    assert cli.guarded(work) == 0
    assert capsys.readouterr() == ("done\n", "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_somebody_ignores_or_handles_stays_so(number: int) -> None:
    """As under nohup, or in a program that calls a verb."""
    before = signal.signal(number, signal.SIG_IGN)
    try:
        assert cli.guarded(lambda: signal.raise_signal(number)) == 0
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)


@contextmanager
def nobody_reads(closed: tuple[int, ...]) -> Iterator[None]:
    """Standard output or error, by their numbers, is a pipe whose other end is closed."""
    streams, kept = (sys.stdout, sys.stderr), {number: os.dup(number) for number in (1, 2)}
    try:
        for number in closed:
            reading, writing = os.pipe()
            os.close(reading)
            os.dup2(writing, number)
            os.close(writing)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        yield
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        sys.stdout, sys.stderr = streams
        for number, copy in kept.items():
            os.dup2(copy, number)
            os.close(copy)


@pytest.mark.parametrize("verb", ["train", *VERBS])
@pytest.mark.parametrize("closed", [(1,), (2,), (1, 2)])
def test_nobody_reads_what_a_verb_says(
    verb: str, closed: tuple[int, ...], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """As after ``| head``: no traceback, the status of a process that SIGPIPE ends, and no complaint at the end."""
    with nobody_reads(closed):
        assert (
            run_verb(verb, lambda: print("said", file=sys.stderr if 2 in closed else None, flush=True), monkeypatch)
            == 141
        )
    assert capfd.readouterr() == ("", "")


def test_an_error_that_nobody_reads_keeps_its_status(capfd: pytest.CaptureFixture[str]) -> None:
    with nobody_reads((2,)):
        assert cli.main(["inspect-indexed", "--nothing"]) == 2
        assert cli.guarded(lambda: 1 // 0) == 1
        assert cli.guarded(lambda: signal.raise_signal(signal.SIGINT)) == 130
    assert capfd.readouterr() == ("", "")


def test_a_forked_process_is_ended_by_sigterm_as_ever() -> None:
    def work() -> None:
        reading, writing = os.pipe()
        if (child := os.fork()) == 0:
            os.write(writing, b"!")  # a signal before this line would be lost: Python drops those of a fork
            time.sleep(60)
            os._exit(1)
        os.read(reading, 1)
        os.kill(child, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM

    assert cli.guarded(work) == 0


def test_a_job_is_ended_by_its_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its ranks are sent SIGTERM when one has failed: they have nothing to say."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    seen = []
    assert cli.guarded(lambda: seen.append(signal.getsignal(signal.SIGTERM)), joins_job=True) == 0
    assert seen == [signal.SIG_DFL]
