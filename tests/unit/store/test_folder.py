"""Folders that appear whole: kept files are what was written, kills leave nothing half done, two writers exclude each
other."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_grit.errors import OutputError
from megatron_grit.store.folder import OutputFolder

FILES = {"a.bin": b"first" * 1000, "sub/b.bin": b"second", "c.bin": b"third"}


def write(target: Path, identity: object = 1, stop_before: str | None = None) -> list[str]:
    """Write what is missing; the names of what was."""
    written = []
    with OutputFolder(target, identity) as folder:
        for name, content in FILES.items():
            if name == stop_before:
                raise KeyError
            if folder.find(name) is None:
                with folder.writing(name) as file:
                    file.write(content)
                written.append(name)
        (folder.path / "note.txt").write_text("no journal knows it")
        folder.publish()
    return written


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_appears_whole_and_nothing_else_stays(tmp_path: Path) -> None:
    assert write(tmp_path / "deep" / "out") == list(FILES)
    assert contents(tmp_path) == {f"deep/out/{name}": data for name, data in FILES.items()} | {
        "deep/out/note.txt": b"no journal knows it"
    }
    with pytest.raises(OutputError, match="out: already exists and is not empty"):
        write(tmp_path / "deep" / "out")
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty")


@pytest.mark.parametrize(
    ("damage", "again"),
    [
        ("none", ["c.bin"]),
        ("byte", ["a.bin", "c.bin"]),
        ("short", ["a.bin", "c.bin"]),
        ("gone", ["sub/b.bin", "c.bin"]),
        ("journal", list(FILES)),
        ("identity", list(FILES)),
    ],
)
def test_a_stopped_run_resumes_with_what_is_whole(tmp_path: Path, damage: str, again: list[str]) -> None:
    target, partial = tmp_path / "out", tmp_path / ".out.partial" / "files"
    with pytest.raises(KeyError):
        write(target, stop_before="c.bin")
    assert not target.exists() and json.loads((partial.parent / "journal.json").read_text())["files"].keys() == {
        "a.bin",
        "sub/b.bin",
    }
    (partial / "sub" / ".c.bin.1.tmp").write_bytes(b"half")  # as a kill leaves it
    (partial / "c.bin").write_bytes(b"half")
    content = (partial / "a.bin").read_bytes()
    if damage == "byte":
        (partial / "a.bin").write_bytes(b"F" + content[1:])
    elif damage == "short":
        (partial / "a.bin").write_bytes(content[:-1])
    elif damage == "gone":
        (partial / "sub" / "b.bin").unlink()
    elif damage == "journal":
        (partial.parent / "journal.json").write_text("{")
    assert write(target, 2 if damage == "identity" else 1) == again
    assert contents(tmp_path) == {f"out/{name}": data for name, data in FILES.items()} | {
        "out/note.txt": b"no journal knows it"
    }


def test_two_writers_exclude_each_other(tmp_path: Path) -> None:
    with OutputFolder(tmp_path / "out", 1), pytest.raises(OutputError, match="out: another process is writing it"):
        write(tmp_path / "out")
    write(tmp_path / "out")


def test_files_that_others_wrote_carry_facts(tmp_path: Path) -> None:
    with OutputFolder(tmp_path / "out", 1, partial=tmp_path / "out.partial") as folder:
        (folder.path / "x").write_bytes(b"x")
        folder.add("x", parts=[[1, 2]])
    with OutputFolder(tmp_path / "out", 1, partial=tmp_path / "out.partial") as folder:
        found = folder.find("x")
        assert found is not None and found["bytes"] == 1 and found["parts"] == [[1, 2]]
        (folder.path / "x").write_bytes(b"y")
        assert folder.find("x") is None


def test_a_full_disk_is_told(tmp_path: Path) -> None:
    def full() -> None:
        raise OSError(28, os.strerror(28))

    with (
        pytest.raises(OutputError, match=r"/a: cannot be written \(No space left on device\); the same"),
        OutputFolder(tmp_path / "out", 1) as folder,
        folder.writing("a"),
    ):
        full()
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="file.* cannot be written"):
        write(tmp_path / "file" / "out")


KILLED = """
import os, signal, sys
from pathlib import Path
from megatron_grit.store import digest, files, folder
left = int(sys.argv[2])
def counted(function):
    def call(*arguments, **options):
        global left
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)
    return call
for name in ("replace", "rename", "fsync"):
    setattr(os, name, counted(getattr(os, name)))
digest.HashingFile.write = counted(digest.HashingFile.write)
Path.unlink = counted(Path.unlink)
sys.path.insert(0, sys.argv[3])
import test_folder
test_folder.write(Path(sys.argv[1]))
"""


def test_killed_at_each_step(tmp_path: Path) -> None:
    """Before each write, rename, flush and removal in turn: the target is whole or not there, and a rerun makes it."""
    moment = 0
    while True:
        moment += 1
        target = tmp_path / str(moment) / "out"
        command = [sys.executable, "-c", KILLED, str(target), str(moment), str(Path(__file__).parent)]
        process = subprocess.run(command, timeout=60)
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL
        if not target.exists():
            write(target)
        assert contents(target) == FILES | {"note.txt": b"no journal knows it"}
        assert {path.name for path in target.parent.iterdir()} <= {"out", ".out.partial"}
    assert moment > 15
