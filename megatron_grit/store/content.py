"""The SHA-256 of files, computed once and remembered on disk; at each opening samples tell whether it still holds.

What is remembered of a file is its size, times and inode, its SHA-256, and a digest of each of its blocks. While size,
times and inode are the same, opening it hashes the first block, the last one and a few at random, which are others
each time; a file of no more blocks than that is hashed whole and nothing is remembered. Where anything differs all of
the file is hashed again, by one process while the others wait. So a digest that is returned is that of the content,
but for damage that keeps times and inode and lies between the samples: :func:`thoroughly` finds that.

Digests are kept in ``.digests`` beside the file, where all nodes find them, else in the user's cache folder. A damaged
one is made again.
"""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_grit.store.cache import cache_path, cached
from megatron_grit.store.digest import count_hashed

BLOCK_BYTES = 1 << 20
NUM_SAMPLES = 6
"""Blocks that are compared at each opening beside the first and the last."""
_DIGEST_BYTES = 16

Stamp = tuple[int, int, int, int]


@dataclass(frozen=True)
class _Content:
    stamp: Stamp
    sha256: str


class _Opened:
    """What was looked at."""

    def __init__(self) -> None:
        self.contents: dict[Path, _Content] = {}
        self.checked: dict[Path, Stamp] = {}


_process = _Opened()
_parts: dict[tuple[str, str], str] = {}
_thorough: ContextVar[_Opened | None] = ContextVar("thorough", default=None)


def content_digest(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's content in hexadecimal, from what is remembered where samples of it hold.

    Raises:
        OSError: the file cannot be read.
    """
    real = Path(path).resolve()
    stamp, whole = _stamp(real), _thorough.get()
    known = (whole or _process).contents.get(real)
    if known is None or known.stamp != stamp:
        known = _Content(stamp, _digest(real, stamp, anew=whole is not None))
        for opened in filter(None, (whole, _process)):
            opened.contents[real] = known
    return known.sha256


def content_part(path: str | os.PathLike[str], what: str, compute: Callable[[], str]) -> str:
    """A digest of some of a file's content, computed once for each content.

    Args:
        path: the file.
        what: names the part.
        compute: the digest; reads the file.

    Raises:
        OSError: the file cannot be read.
    """
    real, key = Path(path).resolve(), (content_digest(path), what)
    if key not in _parts:
        if is_sampled(real):

            def build() -> dict[str, np.ndarray]:
                return {"digest": np.frombuffer(compute().encode(), np.uint8)}

            arrays = cached(_folder(real), f"part-{key[0][:16]}", {"content": key[0], "what": what}, build)
            _parts[key] = arrays["digest"].tobytes().decode()
        else:
            _parts[key] = compute()
    return _parts[key]


def check_once(path: str | os.PathLike[str], check: Callable[[], object]) -> None:
    """Check a file that holds its own checksum, unless this process did and it is the same file still.

    Args:
        path: the file.
        check: reads all of it and raises an error where it is damaged.
    """
    real = Path(path).resolve()
    stamp, opened = _stamp(real), _thorough.get() or _process
    if opened.checked.get(real) != stamp:
        check()
        opened.checked[real] = stamp


def is_sampled(path: Path) -> bool:
    """Whether a file is so large that opening it again reads samples of it alone."""
    return path.stat().st_size > (NUM_SAMPLES + 2) * BLOCK_BYTES


@contextmanager
def thoroughly() -> Iterator[None]:
    """Within it every file is read whole, once, whatever is remembered."""
    token = _thorough.set(_Opened())
    try:
        yield
    finally:
        _thorough.reset(token)


def forget_opened(path: str | os.PathLike[str] | None = None) -> None:
    """Look at a file anew, as another process would; None: at all of them."""
    if path is not None:
        real = Path(path).resolve()
        _process.contents.pop(real, None)
        _process.checked.pop(real, None)
        return
    _process.contents.clear()
    _process.checked.clear()
    _parts.clear()


def _stamp(path: Path) -> Stamp:
    stat = path.stat()
    # The last one changes with any write, even where somebody puts the time of change back.
    return stat.st_size, stat.st_mtime_ns, stat.st_ino, stat.st_ctime_ns


def _digest(path: Path, stamp: Stamp, *, anew: bool) -> str:
    if not is_sampled(path):
        return _hash(path)[0]
    folder, key = _folder(path), {"stamp": list(stamp), "block": BLOCK_BYTES}
    if anew:
        cache_path(folder, "file", key).unlink(missing_ok=True)
    hashed: list[str] = []

    def build() -> dict[str, np.ndarray]:
        sha256, blocks = _hash(path)
        hashed.append(sha256)
        kept = cache_path(folder, "file", key).name, f"part-{sha256[:16]}"
        with suppress(OSError):
            for old in folder.iterdir():  # of earlier contents
                if not any(name in old.name for name in kept):
                    old.unlink()
        return {
            "sha256": np.frombuffer(bytes.fromhex(sha256), np.uint8),
            "blocks": np.frombuffer(blocks, np.uint8).reshape(-1, _DIGEST_BYTES),
        }

    arrays = cached(folder, "file", key, build)
    if not hashed and not _samples_hold(path, arrays["blocks"]):
        return _digest(path, stamp, anew=True)
    return arrays["sha256"].tobytes().hex()


def _samples_hold(path: Path, blocks: np.ndarray) -> bool:
    last = len(blocks) - 1
    with path.open("rb") as file:
        for number in sorted({0, last, *random.SystemRandom().sample(range(len(blocks)), NUM_SAMPLES)}):
            file.seek(number * BLOCK_BYTES)
            block = file.read(BLOCK_BYTES)
            count_hashed(len(block))
            if hashlib.sha256(block).digest()[:_DIGEST_BYTES] != blocks[number].tobytes():
                return False
    return True


def _hash(path: Path) -> tuple[str, bytes]:
    """SHA-256 of a file, and the digests of its blocks, one after the other."""
    whole, blocks = hashlib.sha256(), []
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            count_hashed(len(block))
            whole.update(block)
            blocks.append(hashlib.sha256(block).digest()[:_DIGEST_BYTES])
    return whole.hexdigest(), b"".join(blocks)


def _folder(path: Path) -> Path:
    """Where the digests of a file are kept."""
    beside = path.parent / ".digests"
    if os.access(beside if beside.is_dir() else path.parent, os.W_OK):
        return beside / path.name
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "megatron_grit" / "digests" / hashlib.sha256(os.fsencode(path)).hexdigest()[:24]
