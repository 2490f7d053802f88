"""Files that appear whole or not at all."""

from __future__ import annotations

import gzip
import io
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from megatron_grit.errors import ConfigError


@contextmanager
def replacing_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A path to write a file at; when the block ends the file replaces ``path``, and when it fails it is removed.

    Args:
        path: the file to write; its folder is made where it is not there.
    """
    path = Path(path)
    # Two hosts that share a file system may have processes of one number.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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
        file.write(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def sync_folder(folder: Path) -> None:
    """Flush a folder's list of names to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
