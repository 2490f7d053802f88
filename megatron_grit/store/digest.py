"""SHA-256 of settings, arrays and files: what a stored result is recognised by.

These digests are in files and in names of files, so what they are computed from must not change.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from typing_extensions import Buffer

_BLOCK_BYTES = 1 << 24
_hashed = 0
_stop: ContextVar[threading.Event | None] = ContextVar("stop", default=None)


class HashingStopped(Exception):
    """Files were being compared with their checksums, and nobody waits for the answer any more."""


@contextmanager
def stopped_by(event: threading.Event) -> Iterator[None]:
    """Within it this thread hashes no further block once the event is set: :class:`HashingStopped` is raised."""
    token = _stop.set(event)
    try:
        yield
    finally:
        _stop.reset(token)


def count_hashed(num_bytes: int) -> None:
    """Count bytes of files and arrays that this process hashed.

    Raises:
        HashingStopped: see :func:`stopped_by`.
    """
    global _hashed
    _hashed += num_bytes
    event = _stop.get()
    if event is not None and event.is_set():
        raise HashingStopped


def hashed_bytes() -> int:
    """Bytes of files and arrays that this process hashed so far."""
    return _hashed


def canonical_json(value: object) -> bytes:
    """JSON that does not depend on the order of keys."""
    return json.dumps(value, sort_keys=True).encode()


def digest_of_settings(settings: object) -> str:
    """SHA-256 of anything that JSON can hold; the order of keys does not count."""
    return hashlib.sha256(canonical_json(settings)).hexdigest()


def digest_of_arrays(arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256 of names, types, shapes and bytes."""
    import numpy as np  # configurations import this file, and need no arrays

    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(array.data.cast("B") if array.size else b"")
        count_hashed(array.nbytes)
    return digest.hexdigest()


def digest_of_rows(*arrays: Any, prefix: bytes = b"") -> str:
    """SHA-256 of the bytes of arrays, which may be mapped or datasets of HDF5: read a few rows at a time.

    Args:
        arrays: one after another.
        prefix: bytes that come before them.
    """
    digest = hashlib.sha256(prefix)
    for array in arrays:
        step = max(1, _BLOCK_BYTES // max(array[:1].nbytes, 1))
        for start in range(0, len(array), step):
            content = array[start : start + step].tobytes()
            digest.update(content)
            count_hashed(len(content))
    return digest.hexdigest()


def sha256_of_file(
    path: str | os.PathLike[str], num_bytes: int | None = None, report: Callable[[int], object] | None = None
) -> str:
    """SHA-256 of a file's content in hexadecimal.

    Args:
        path: the file.
        num_bytes: only of so many bytes from the start.
        report: called with the size of each part that was read.
    """
    digest, left = hashlib.sha256(), os.path.getsize(path) if num_bytes is None else num_bytes
    with open(path, "rb") as file:
        if num_bytes is None and report is None:
            count_hashed(left)
            return hashlib.file_digest(file, "sha256").hexdigest()
        while block := file.read(min(left, _BLOCK_BYTES)):
            digest.update(block)
            count_hashed(len(block))
            left -= len(block)
            if report is not None:
                report(len(block))
    return digest.hexdigest()


def digest_of_files(root: Path, files: Iterable[Path], settings: object) -> str:
    """SHA-256 of settings, and of the relative paths and contents of those files that exist."""
    digest = hashlib.sha256(canonical_json(settings))
    for path in sorted(set(files)):
        if path.is_file():
            # Sizes separate one file from the next.
            digest.update(f"\n{path.relative_to(root).as_posix()} {path.stat().st_size}\n".encode())
            with path.open("rb") as file:
                while block := file.read(_BLOCK_BYTES):
                    digest.update(block)
    return digest.hexdigest()


def describe_file(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file, ``{"bytes": ..., "sha256": ...}``."""
    return {"bytes": path.stat().st_size, "sha256": sha256_of_file(path)}


def is_as_described(path: Path, entry: Mapping[str, Any]) -> bool:
    """Whether a file exists with the size and the SHA-256 that an entry of :func:`describe_file` says; reads it."""
    return path.is_file() and path.stat().st_size == entry["bytes"] and sha256_of_file(path) == entry["sha256"]


class HashingFile:
    """A file that is written from front to back, with the SHA-256 of what was written.

    Args:
        file: None: what is written is hashed and goes nowhere.
        prefix: bytes that count for the digest and are not written.
    """

    def __init__(self, file: IO[bytes] | None, prefix: bytes = b"") -> None:
        self._file = file
        self._digest = hashlib.sha256(prefix)
        self.num_bytes = 0

    def write(self, content: Buffer, /) -> int:
        """Append bytes; returns how many."""
        self._digest.update(content)
        written = memoryview(content).nbytes if self._file is None else self._file.write(content)
        self.num_bytes += written
        return written

    def into(self, file: IO[bytes]) -> HashingFile:
        """The same digest so far, for what is now appended to another file."""
        self._file = file
        return self

    def digest(self) -> bytes:
        """SHA-256 of what was written so far."""
        return self._digest.digest()

    def entry(self) -> dict[str, Any]:
        """Size and SHA-256, as :func:`describe_file` would say."""
        return {"bytes": self.num_bytes, "sha256": self._digest.hexdigest()}
