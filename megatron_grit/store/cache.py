"""Arrays that take long to compute, cached on disk: built once and compared with their checksum at each opening.

The name of a cache file has a hash of its key: checksums of the sources, every option, the version of the format. A
changed source or option is therefore another file. The file begins with a SHA-256 of all that follows and holds the
whole key; a file that is damaged, or that belongs to another key, is built again with a warning.

The process that gets the lock builds, the others wait and read: once on a file system that all nodes share, once per
node on a local one. Without locks each process builds; all of them write the same bytes, and the last rename wins.

The layout is in docs/data_formats.md.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from megatron_grit.errors import DataError
from megatron_grit.store.digest import HashingFile, canonical_json, digest_of_settings
from megatron_grit.store.files import replacing
from megatron_grit.store.lock import locked
from megatron_grit.store.logs import get_logger

log = get_logger(__name__)

FORMAT_VERSION = 1
_MAGIC = b"GRITCACH"
_HEADER = struct.Struct("<8s32sQ")  # magic, SHA-256 of what follows it, bytes of the description
_ALIGNMENT = 64
_NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT)

Arrays = dict[str, np.ndarray]


def cached(
    folder: str | os.PathLike[str], name: str, key: Mapping[str, Any], build: Callable[[], Mapping[str, np.ndarray]]
) -> Arrays:
    """The arrays of a key, from the cache if they are there, else built and written.

    Args:
        folder: cache folder; created if missing. Where it cannot be written the arrays are built, with a warning.
        name: beginning of the file's name, for people.
        key: all that the arrays depend on; JSON values.
        build: makes the arrays.

    Returns:
        Arrays by name. Those that come from the file are mapped and read-only.
    """
    path = cache_path(folder, name, key)
    found = load(path, key)
    if found is not None:
        return found
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path.with_name(f".{path.name}.lock"), path, wait=True):
            found = load(path, key)  # by the process that had the lock before
            if found is None:
                store(path, key, build())
                found = load(path, key)
    except OSError as error:
        if error.errno not in _NOT_WRITABLE:
            raise
        log.warning(f"{path.parent}: cannot be written ({error.strerror}), so {name} is not cached")
        return dict(build())
    if found is None:
        raise DataError("does not read back as it was written; check the disk, or set data.cache_dir", path=path)
    return found


def cache_path(folder: str | os.PathLike[str], name: str, key: Mapping[str, Any]) -> Path:
    """The file of a key."""
    digest = digest_of_settings(_versioned(key))
    return Path(folder) / f"{name}-{digest[:24]}.cache"


def load(path: Path, key: Mapping[str, Any]) -> Arrays | None:
    """The arrays of a file: None where there is none or, with a warning, where it is damaged or of another key."""
    try:
        return _read(path, key)
    except FileNotFoundError:
        return None
    except _BadCacheError as error:
        log.warning(f"{path}: {error}; it is built again")
        return None


def store(path: Path, key: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays under a temporary name, flush them to disk and rename.

    Raises:
        OSError: the folder cannot be written.
    """
    parts, described, offset = [], [], 0
    for name, array in arrays.items():
        array = np.asarray(array, order="C")
        padding = -offset % _ALIGNMENT
        offset += padding
        described.append({"name": name, "dtype": array.dtype.str, "shape": list(array.shape), "offset": offset})
        parts.append((padding, array))
        offset += array.nbytes
    description = json.dumps({"key": json.loads(canonical_json(_versioned(key))), "arrays": described}).encode()
    description += b" " * (-(_HEADER.size + len(description)) % _ALIGNMENT)
    with replacing(path, "wb") as file:
        file.write(b"\0" * _HEADER.size)
        hashing = HashingFile(file, prefix=struct.pack("<Q", len(description)))
        hashing.write(description)
        for padding, array in parts:
            hashing.write(b"\0" * padding)
            hashing.write(array.reshape(-1).view(np.uint8).data if array.size else b"")
        file.seek(0)
        file.write(_HEADER.pack(_MAGIC, hashing.digest(), len(description)))


class _BadCacheError(Exception):
    """Why a cache file is not used."""


def _read(path: Path, key: Mapping[str, Any]) -> Arrays:
    with path.open("rb") as file:
        header = file.read(_HEADER.size)
        if len(header) < _HEADER.size:
            raise _BadCacheError("ends within its header")
        magic, digest, length = _HEADER.unpack(header)
        if magic != _MAGIC:
            raise _BadCacheError("is not a cache file")
        file.seek(_HEADER.size - 8)
        if hashlib.file_digest(file, "sha256").digest() != digest:
            raise _BadCacheError("is damaged: its SHA-256 is another")
        size = file.tell()
        file.seek(_HEADER.size)
        description = json.loads(file.read(length))
        if description["key"] != json.loads(canonical_json(_versioned(key))):
            raise _BadCacheError("is of other sources or options")
        if size == _HEADER.size + length:
            return {entry["name"]: _empty(entry) for entry in description["arrays"]}
        mapped = np.memmap(file, dtype=np.uint8, mode="r", offset=_HEADER.size + length)
    arrays = {}
    for entry in description["arrays"]:
        shape = tuple(entry["shape"])
        dtype, count = np.dtype(entry["dtype"]), int(np.prod(shape, dtype=np.int64))
        arrays[entry["name"]] = np.frombuffer(mapped, dtype, count, entry["offset"]).reshape(shape)
    return arrays


def _empty(entry: dict[str, Any]) -> np.ndarray:
    return np.empty(entry["shape"], dtype=entry["dtype"])


def _versioned(key: Mapping[str, Any]) -> dict[str, Any]:
    return {"version": FORMAT_VERSION, **key}
