"""Processes of a build and Ctrl-C."""

from __future__ import annotations

import multiprocessing.popen_spawn_posix
import os
import signal
import threading
from collections.abc import Callable
from multiprocessing import resource_tracker
from typing import Any

import psutil
import pytest

from megatron_grit.data.builders.work_pool import map_ordered


def double() -> Callable[[int], int]:
    return lambda number: 2 * number


def test_ctrl_c_waits_until_a_process_that_starts_knows_what_to_run(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Another thread takes the signal while this one is between spawning a process and writing to it."""
    resource_tracker.ensure_running()  # a process of its own
    spawn = multiprocessing.popen_spawn_posix.util.spawnv_passfds
    started: list[int] = []

    def interrupted(*args: Any) -> int:
        started.append(spawn(*args))
        # Threads that are not blocked get the signal; this one is told at its next bytecode.
        thread = threading.Thread(target=_take_interrupt)
        thread.start()
        thread.join()
        return started[-1]

    monkeypatch.setattr(multiprocessing.popen_spawn_posix.util, "spawnv_passfds", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(map_ordered(iter(range(8)), double, 2))
    assert len(started) == 1, "the interrupt comes once the first process has been started"
    assert not psutil.pid_exists(started[0]), "and ends it"
    assert "Traceback" not in capfd.readouterr().err


def _take_interrupt() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    os.kill(os.getpid(), signal.SIGINT)
