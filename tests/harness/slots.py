"""Slots for processes, shared by all workers of a test run: a job of several processes waits for as many.

Two jobs of eight gloo processes at a time spend most of it switching between threads. The slots are locked files, so
that those of a process that dies are free again.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

FOLDER = "MEGATRON_GRIT_TEST_SLOTS"
"""Variable that names the folder of the locked files; without it nobody waits."""
NUM_SLOTS = max(4, 2 * (os.cpu_count() or 1))
_held = 0  # by this process, so that a job inside a test that has slots does not wait for its own


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            # Closing would not do where a fork has the file as well.
            fcntl.flock(file, fcntl.LOCK_UN)


def _take(folder: Path, stack: ExitStack) -> None:
    """One slot, whichever becomes free."""
    while True:
        for number in range(NUM_SLOTS):
            file = (folder / f"slot{number}").open("w")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.close()
                continue
            stack.callback(file.close)
            stack.callback(fcntl.flock, file, fcntl.LOCK_UN)
            return
        time.sleep(0.05)


@contextmanager
def slots(wanted: int) -> Iterator[None]:
    """Hold so many slots, at most all of them."""
    global _held
    missing = min(wanted, NUM_SLOTS) - _held
    if missing <= 0 or FOLDER not in os.environ:
        yield
        return
    folder = Path(os.environ[FOLDER])
    with ExitStack() as stack:
        with _locked(folder / "queue"):  # one job after another takes what it needs: two never wait for each other
            for _ in range(missing):
                _take(folder, stack)
        _held += missing
        try:
            yield
        finally:
            _held -= missing


def pytest_configure(config: pytest.Config) -> None:
    """The process that starts the workers makes the folder; they inherit its name."""
    if not hasattr(config, "workerinput"):
        os.environ[FOLDER] = tempfile.mkdtemp(prefix="slots-")


def pytest_unconfigure(config: pytest.Config) -> None:
    """Clear up."""
    if not hasattr(config, "workerinput") and FOLDER in os.environ:
        shutil.rmtree(os.environ.pop(FOLDER), ignore_errors=True)


@pytest.fixture(autouse=True)
def _slots_of_a_test(request: Any) -> Iterator[None]:
    """What ``pytest.mark.processes(N)`` asks for."""
    mark = request.node.get_closest_marker("processes")
    with slots(mark.args[0] if mark else 0):
        yield
