"""Files that appear whole or not at all."""

from __future__ import annotations

import glob
import gzip
import hashlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from megatron_grit.errors import ConfigError, OutputError
from megatron_grit.store.environment import is_alive, process_space

_searched: set[Path] = set()


@contextmanager
def replacing_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A path to write a file at; when the block ends the file replaces ``path``, and when it fails it is removed.

    Where a killed process of this user has left one in the folder since this host started, it is removed as well.

    Args:
        path: the file to write; its folder is made where it is not there.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{_place()}{os.urandom(3).hex()}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path.parent)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _place() -> str:
    """Two hosts that share a file system may have processes of one number."""
    return hashlib.sha256(process_space().encode()).hexdigest()[:8]


def _remove_leftovers(folder: Path) -> None:
    """Remove what processes of this user and host that are gone were writing: once a process and folder, which may be
    large. A file in doubt stays."""
    if (folder := folder.absolute()) in _searched:
        return
    _searched.add(folder)
    with suppress(OSError):
        for path in folder.glob(f".*.{_place()}??????.tmp"):
            pid = path.name.split(".")[-3]
            if pid.isdecimal() and path.lstat().st_uid == os.geteuid() and not is_alive(int(pid)):
                path.unlink(missing_ok=True)


def check_output(path: str | os.PathLike[str], reads: Iterable[str | os.PathLike[str]] = ()) -> None:
    """Refuse a file that cannot be written, or that is read, before there is something to write.

    Args:
        path: the file to write.
        reads: files, folders and glob patterns that are read; links and relative paths to ``path`` are found.

    Raises:
        ConfigError: it names a folder, something else than a file, or what is read.
        OutputError: it cannot be written.
    """
    text, path = os.fspath(path), Path(path)
    if not text or text.endswith(os.sep) or path.is_dir():
        raise ConfigError(f"{text!r} is a folder; give the name of a file to write")
    if path.exists() and not path.is_file():
        raise ConfigError(f"{path} is no regular file; give the name of a file to write")
    for given in reads:
        for other in [given] if os.path.exists(given) else glob.glob(os.fspath(given), recursive=True):
            if path.exists() and path.samefile(other):
                raise ConfigError(f"{path} would take the place of {other}, which is read; give another output")
    folder = existing_folder(path)
    try:
        with tempfile.NamedTemporaryFile(prefix=f".{path.name[:100]}.", suffix=".tmp", dir=folder):
            pass
    except OSError as error:
        raise OutputError(f"cannot be written ({error.strerror}: {folder})", path=path) from None


def check_prefix(prefix: str | os.PathLike[str]) -> None:
    """Refuse a prefix of file names that is a folder: the names would begin with a dot, or lie beside the folder.

    Raises:
        ConfigError: it ends in a slash.
    """
    text = os.fspath(prefix)
    if os.path.basename(text) in ("", ".", ".."):
        raise ConfigError(
            f"{text!r} is a folder, and file names begin with the prefix; give one such as {os.path.join(text, 'data')}"
        )


def check_room(path: str | os.PathLike[str], num_bytes: int) -> None:
    """Refuse to begin what does not fit.

    Args:
        path: a file or folder, which may not be there yet, on the disk in question.
        num_bytes: that are still to be written.

    Raises:
        OutputError: says how many bytes are missing.
    """
    free = shutil.disk_usage(existing_folder(Path(path))).free
    if free < num_bytes:
        raise OutputError(
            f"needs {num_bytes:,} more bytes and {free:,} are free, so {num_bytes - free:,} are missing; make room, or "
            "write to another disk",
            path=Path(path),
        )


def existing_folder(path: Path) -> Path:
    """The innermost folder around a path, or itself, that is there."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def check_text_path(path: str | os.PathLike[str]) -> None:
    """Refuse a name that :func:`replacing` would refuse, before there is something to write.

    Raises:
        ConfigError: one that says it is compressed in a way that is read and not written.
    """
    if Path(path).suffix == ".zst":
        raise ConfigError(f"{path}: .zst is read and not written; name it .gz, or without either")


@contextmanager
def replacing(path: str | os.PathLike[str], mode: str = "w") -> Iterator[IO[Any]]:
    """A file to write, as :func:`replacing_path`.

    Args:
        path: the file to write; its folder is made where it is not there. Text is compressed where it ends in ``.gz``.
        mode: "w" for UTF-8 text, "wb" for bytes.

    Raises:
        ConfigError: text for a ``.zst``, which is read and not written.
    """
    if mode == "w":
        check_text_path(path)
    with replacing_path(path) as temporary:
        if mode == "w" and Path(path).suffix == ".gz":
            # Without a name and a time, equal texts are equal files.
            with (
                temporary.open("wb") as raw,
                gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as packed,
                io.TextIOWrapper(packed, encoding="utf-8") as file,
            ):
                yield file
        else:
            with temporary.open(mode, encoding=None if "b" in mode else "utf-8") as file:
                yield file


def write_json(path: str | os.PathLike[str], value: object) -> None:
    """Write a value as indented JSON, atomically.

    Raises:
        ValueError: a number that is not finite.
    """
    with replacing(path) as file:
        file.write(json_text(value, indent=2, allow_nan=False) + "\n")


def json_text(value: object, *, indent: int | None = None, allow_nan: bool = True) -> str:
    """JSON that can be written as UTF-8. Letters stay as they are, unless a name of a file that is no UTF-8 is in a
    text: then they are escaped, and a reader gets the name back.

    Args:
        value: what is written.
        indent: spaces of a level. None: all on one line.
        allow_nan: whether a number may be not finite.

    Raises:
        ValueError: a number that is not finite.
    """
    text = json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=allow_nan)
    try:
        text.encode()
    except UnicodeEncodeError:
        text = json.dumps(value, indent=indent, allow_nan=allow_nan)
    return text


def sync_folder(folder: Path) -> None:
    """Flush a folder's list of names to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
