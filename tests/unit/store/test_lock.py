"""The lock: one holder at a time, released by a kill, right after its folder was removed, a warning without locks."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from megatron_grit.errors import OutputError
from megatron_grit.store.lock import locked

HOLD = """
import sys, time
from pathlib import Path
from megatron_grit.store.lock import locked
with locked(Path(sys.argv[1]), Path("out")):
    print("held", flush=True)
    time.sleep(60)
"""


def test_another_process_is_named_and_its_death_frees_the_lock(tmp_path: Path) -> None:
    path = tmp_path / "work" / ".lock"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        with pytest.raises(
            OutputError,
            match=rf"^out: another process is writing it \(process {process.pid} on \S+\); wait for it or end it$",
        ):
            locked(path, Path("out")).__enter__()
        with pytest.raises(OutputError), locked(path, Path("out"), shared=True):
            pass
        process.send_signal(signal.SIGKILL)
    with locked(path, Path("out")):
        pass
    assert path.read_bytes() == b""  # neither the killed one nor the last one


def test_shared_holders_exclude_others_only(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    both = locked(path, tmp_path, shared=True), locked(path, tmp_path, shared=True)
    with both[0], both[1], pytest.raises(OutputError), locked(path, tmp_path):
        pass
    with locked(path, tmp_path), pytest.raises(OutputError), locked(path, tmp_path, shared=True):
        pass


def test_a_lock_whose_folder_was_removed_meanwhile_is_taken_anew(tmp_path: Path) -> None:
    """The waiting process gets the lock of a file that is gone; a third one would lock another file."""
    path, order = tmp_path / "work" / ".lock", []

    def second() -> None:
        with locked(path, tmp_path, wait=True):
            order.append("second")
            with pytest.raises(OutputError), locked(path, tmp_path):
                order.append("third")

    with locked(path, tmp_path):
        thread = threading.Thread(target=second, daemon=True)
        thread.start()
        thread.join(0.2)
        assert thread.is_alive() and not order
        shutil.rmtree(path.parent)
    thread.join(10)
    assert order == ["second"] and path.exists()


def test_without_locks_there_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(38, os.strerror(38))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with locked(tmp_path / ".lock", tmp_path / "out"):
        assert caplog.messages == [
            f"{tmp_path / 'out'}: cannot be locked (Function not implemented); make sure that nothing else writes it"
        ]
    caplog.clear()
    with locked(tmp_path / ".lock", tmp_path / "out", wait=True):
        assert not caplog.messages
