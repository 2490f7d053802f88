"""Outputs are checked before there is something to write: what is read, what is no file, where there is no room."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import pytest

from megatron_grit.errors import ConfigError, OutputError
from megatron_grit.store import environment, files
from megatron_grit.store.files import check_output, check_prefix, check_room, write_json


def test_what_is_read_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, folder = tmp_path / "read.jsonl", tmp_path / "folder"
    folder.mkdir()
    read.write_text("text")
    (tmp_path / "link.jsonl").symlink_to(read)
    os.link(read, tmp_path / "hard.jsonl")
    monkeypatch.chdir(folder)
    for output in (read, "../read.jsonl", tmp_path / "link.jsonl", tmp_path / "hard.jsonl", folder / ".." / read.name):
        for given in (read, tmp_path / "re*.jsonl"):
            with pytest.raises(ConfigError, match=r"would take the place of \S+read.jsonl, which is read"):
                check_output(output, [tmp_path / "missing", given])
    check_output(folder / "new" / "out.jsonl", [read])
    assert not list(folder.iterdir()), "nothing is left behind"


def test_what_is_no_file_is_not_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for output in ("", tmp_path, f"{tmp_path}/missing/", "/dev/null"):
        with pytest.raises(ConfigError, match="give the name of a file"):
            check_output(output)
    with pytest.raises(OutputError, match="file/out: cannot be written"):
        check_output("/proc/file/out")
    for prefix in ("", "data/", ".", "data/..", "./"):
        with pytest.raises(ConfigError, match="is a folder, and file names begin with the prefix; give one such as"):
            check_prefix(prefix)
    check_prefix("data")


def test_missing_bytes_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(0, 0, 1000 if folder == tmp_path else 0))
    check_room(tmp_path / "not" / "there", 1000)
    with pytest.raises(OutputError, match="out: needs 3,500 more bytes and 1,000 are free, so 2,500 are missing"):
        check_room(tmp_path / "out", 3500)


def test_names_that_are_no_utf_8_are_written_and_read_back(tmp_path: Path) -> None:
    path = tmp_path / "facts.json"
    for name, is_escaped in (("caf\u00e9", False), (os.fsdecode(b"caf\xff"), True)):
        write_json(path, {"input": [name]})
        assert json.loads(path.read_text(encoding="utf-8")) == {"input": [name]}
        assert ("\\u" in path.read_text(encoding="utf-8")) == is_escaped


def killed_writer(folder: Path) -> tuple[Path, int]:
    """What a process that is gone was writing, and its number."""
    if (child := os.fork()) == 0:
        with files.replacing(folder / "out.json") as file:
            file.write("half")
            file.flush()
            signal.raise_signal(signal.SIGKILL)
    os.waitpid(child, 0)
    (left,) = folder.glob(f".out.json.{child}.*")
    return left, child


def test_what_a_killed_process_was_writing_is_removed_by_the_next_one(tmp_path: Path) -> None:
    """Not what a process of another host writes, nor one that runs."""
    left, child = killed_writer(tmp_path)
    dead, alive = str(child), str(os.getpid())
    here, elsewhere = left.name.replace("out.json", "b.c"), left.name.replace(f".{dead}.", f".{dead}.{'0' * 8}")
    no_id = here.replace(f".{dead}.", f".{10**30}.")
    for name in (here, here.replace(dead, alive), no_id, elsewhere, f".mine.{dead}.tmp"):
        (tmp_path / name).touch()
    write_json(tmp_path / "other.json", {})
    found = {path.name for path in tmp_path.iterdir()}
    assert found == {"other.json", here.replace(dead, alive), no_id, elsewhere, f".mine.{dead}.tmp"}


def boot_id_of(text: str) -> Callable[..., IO[str]]:
    """For ``open``: a boot id. Empty: there is none. A "?" is random."""

    def opened(path: str, **options: Any) -> IO[str]:
        if path != "/proc/sys/kernel/random/boot_id":
            return open(path, **options)
        if not text:
            raise FileNotFoundError(path)
        return io.StringIO(text.replace("?", os.urandom(4).hex()))

    return opened


def forbidden(*_: object) -> None:
    raise PermissionError("of another user")


DOUBTS: dict[str, tuple[Any, str, Any]] = {
    "file of another owner": (os, "geteuid", lambda: os.getuid() + 1),
    "process of another user, which /proc hides": (os, "kill", forbidden),
    "host without a boot id": (environment, "open", boot_id_of("")),
    "host of the same name, or another boot": (environment, "open", boot_id_of("?\n")),
    "/proc of another namespace": (
        os,
        "readlink",
        lambda path, readlink=os.readlink: "1" if path == "/proc/self" else readlink(path),
    ),
}


@pytest.mark.parametrize("doubt", DOUBTS)
def test_what_may_be_of_a_process_that_runs_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, doubt: str) -> None:
    """Be the writer known to a host that can tell, or under the same doubt."""
    before, _ = killed_writer(tmp_path)
    target, name, value = DOUBTS[doubt]
    monkeypatch.setattr(target, name, value, raising=False)
    left, _ = killed_writer(tmp_path)
    write_json(tmp_path / "other.json", {})
    assert before.exists() and left.exists()
    monkeypatch.undo()
    files._searched.discard(tmp_path)
    write_json(tmp_path / "other.json", {})
    assert not before.exists(), "without the doubt it is removed"
