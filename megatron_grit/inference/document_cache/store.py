"""Caches in memory and on disk.

A cache is one file, written beside its place and renamed, with the SHA-256 of its arrays and its facts in its head: it
is whole or not there, and is mapped rather than read. Its name is a digest of what it follows from, so other models
find nothing in it. A file that is damaged is removed, and its cache made again. Beside each file stands an empty one
whose time says when it was last read; the longest unread caches go when there are more bytes than the folder may hold.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from megatron_grit.config.values import shortened
from megatron_grit.errors import ConfigError, DataError
from megatron_grit.inference.document_cache.document_cache import DocumentCache, Storage
from megatron_grit.inference.document_cache.identity import CacheIdentity
from megatron_grit.store.content import check_once
from megatron_grit.store.digest import digest_of_rows, digest_of_settings
from megatron_grit.store.files import replacing_path
from megatron_grit.store.lock import locked
from megatron_grit.store.logs import get_logger
from megatron_grit.store.sealed import seal, unseal

log = get_logger(__name__)

FORMAT = 1
SUFFIX = ".safetensors"
_FACTS = "facts"


class CacheStore:
    """Caches that were made before: files of a folder; in memory where there is no folder, or it cannot be written.

    Several processes may use one folder.

    Args:
        folder: made where it is missing. None: memory only.
        memory_bytes: of arrays in memory; the longest unread ones go.
        disk_bytes: of files in the folder.

    Raises:
        ConfigError: a budget that is no number of bytes.
    """

    def __init__(
        self, folder: str | Path | None = None, *, memory_bytes: int = 1 << 30, disk_bytes: int = 1 << 36
    ) -> None:
        for name, value in (("memory_bytes", memory_bytes), ("disk_bytes", disk_bytes)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ConfigError(f"{name} must be int, at least 0, not {shortened(value)}")
        self._folder = None if folder is None else Path(folder)
        self._memory_bytes, self._disk_bytes = memory_bytes, disk_bytes
        self._held: OrderedDict[str, DocumentCache] = OrderedDict()
        self._said_full = False

    def get(self, identity: CacheIdentity, tokens: Sequence[int], storage: Storage) -> DocumentCache | None:
        """The cache of a text. None: there is none, or it is damaged, which is said."""
        key = _key(identity, tokens, storage)
        if key in self._held:
            self._held.move_to_end(key)
            return self._held[key]
        if self._folder is None:
            return None
        path = self._path(key)
        try:
            cache = load_cache(path)
        except FileNotFoundError:
            return None
        except (DataError, OSError) as error:
            log.warning(f"{error}; it is made again")
            with suppress(OSError):
                path.unlink(missing_ok=True)
            return None
        with suppress(OSError):  # a folder that is only read
            path.with_suffix(".used").touch()
        return cache

    def put(self, cache: DocumentCache) -> None:
        """Keep a cache. Where it cannot be written, that is said once, and it is kept in memory as far as there is
        room; what is on disk already stays whole."""
        key = _key(cache.identity, cache.tokens, cache.storage)
        if self._folder is not None and cache.num_bytes <= self._disk_bytes:
            try:
                self._write(key, cache)
                return
            except OSError as error:
                if not self._said_full:
                    self._said_full = True
                    log.warning(f"{self._folder}: caches cannot be written ({error.strerror or error}); kept in memory")
        self._held[key] = cache
        self._held.move_to_end(key)
        while sum(held.num_bytes for held in self._held.values()) > self._memory_bytes:
            self._held.popitem(last=False)

    def _write(self, key: str, cache: DocumentCache) -> None:
        assert self._folder is not None
        path = self._path(key)
        with locked(self._folder / ".lock", self._folder, wait=True):
            save_cache(path, cache)
            self._evict(path)

    def _evict(self, newest: Path) -> None:
        """Remove the longest unread files until the others, with the newest, fit."""
        assert self._folder is not None
        sizes = {path: path.stat().st_size for path in self._folder.glob(f"*/*{SUFFIX}")}
        total = sum(sizes.values())
        for path in sorted(sizes, key=_last_use):
            if total <= self._disk_bytes:
                return
            if path != newest or len(sizes) == 1:
                path.unlink(missing_ok=True)
                path.with_suffix(".used").unlink(missing_ok=True)
                total -= sizes[path]

    def _path(self, key: str) -> Path:
        assert self._folder is not None
        return self._folder / key[:2] / f"{key}{SUFFIX}"


def _last_use(path: Path) -> int:
    times = [path.stat().st_mtime_ns]
    with suppress(OSError):
        times.append(path.with_suffix(".used").stat().st_mtime_ns)
    return max(times)


def _key(identity: CacheIdentity, tokens: Sequence[int], storage: Storage) -> str:
    return digest_of_settings([FORMAT, asdict(identity), list(tokens), storage])


def save_cache(path: str | Path, cache: DocumentCache) -> None:
    """Write a cache to a file, which appears whole or not at all.

    Raises:
        OSError: it cannot be written; what was there stays.
    """
    from safetensors.torch import save_file

    facts = {
        "format": FORMAT,
        "identity": asdict(cache.identity),
        "tokens": list(cache.tokens),
        "start": cache.start,
        "storage": cache.storage,
        "shape": list(cache.shape),
        "sha256": _digest(cache.arrays),
    }
    with replacing_path(path) as temporary, _as_os_error(path):
        save_file(cache.arrays, temporary, {_FACTS: json.dumps(seal(facts))})


def load_cache(path: str | Path) -> DocumentCache:
    """A cache of a file, mapped. Its checksum is compared once in a process, while the file is the same.

    Raises:
        FileNotFoundError: there is no file.
        DataError: it is none of a cache, or damaged.
    """
    from safetensors import safe_open

    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(path)
    try:
        with safe_open(path, framework="pt") as file:
            facts = unseal(json.loads((file.metadata() or {})[_FACTS]))
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 not a mapping
        if facts["format"] != FORMAT:
            raise DataError(f"is a cache of format {facts['format']}, and this version reads {FORMAT}", path=path)
        check_once(path, lambda: _check_digest(arrays, facts["sha256"], path))
        return DocumentCache(
            identity=CacheIdentity(**facts["identity"]),
            tokens=tuple(facts["tokens"]),
            start=facts["start"],
            storage=facts["storage"],
            shape=tuple(facts["shape"]),
            arrays=arrays,
        )
    except DataError:
        raise
    except Exception as error:  # whatever a damaged head makes of the library
        raise DataError(f"is no whole cache ({type(error).__name__}: {shortened(str(error))})", path=path) from error


def _check_digest(arrays: dict[str, torch.Tensor], expected: str, path: Path) -> None:
    if _digest(arrays) != expected:
        raise DataError("is a damaged cache: its arrays do not match their checksum", path=path)


def _digest(arrays: dict[str, torch.Tensor]) -> str:
    names = sorted(arrays)
    described: list[Any] = [[name, str(arrays[name].dtype), list(arrays[name].shape)] for name in names]
    flat = [arrays[name].contiguous().view(torch.uint8).flatten().numpy() for name in names]
    return digest_of_rows(*flat, prefix=json.dumps(described).encode())


@contextmanager
def _as_os_error(path: str | Path) -> Iterator[None]:
    """The library's own errors of a file that cannot be written are none of the system's."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        if type(error).__name__ != "SafetensorError":
            raise
        raise OSError(None, str(error), str(path)) from error
