"""The results of a long computation as a folder of blocks; a killed run resumes from the finished ones.

The items [0, n) are split into blocks of a fixed size, one HDF5 file each, named by its first item and the one after
its last: ``000000-100000.hdf5``. A block is written under a temporary name and renamed, so it is whole or missing. It
holds the SHA-256 of its arrays and a signature of all that they follow from, so that damaged blocks and those of other
settings or data are computed again.

A block's content does not depend on the process that computes it, so neither does the folder on their number.
"""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_grit.errors import DataError, OutputError
from megatron_grit.store.content import check_once, content_part, is_sampled
from megatron_grit.store.digest import digest_of_arrays, digest_of_settings
from megatron_grit.store.files import replacing_path

Arrays = dict[str, np.ndarray]
DAMAGED = (OSError, KeyError, RuntimeError, ValueError, TypeError, AttributeError, MemoryError, OverflowError)
"""What h5py raises of a damaged file: names become bytes, arrays types or groups, sizes more than there is memory."""


@dataclass(frozen=True)
class Block:
    """Items ``start`` to ``stop - 1`` and their file."""

    start: int
    stop: int
    path: Path
    number: int = 0

    def __len__(self) -> int:
        return self.stop - self.start


class BlockFolder:
    """Blocks of one computation.

    Args:
        folder: created if missing.
        num_items: n.
        block_size: items of a block; the last one may have fewer.
        signature: of all that the content follows from: settings, and fingerprints of what is read.
        remedy: what to run when a block is missing, for errors.
    """

    def __init__(
        self,
        folder: Path,
        num_items: int,
        block_size: int,
        signature: Mapping[str, Any],
        remedy: str = "run the same command again",
    ) -> None:
        self.folder, self.num_items, self.block_size, self.remedy = folder, num_items, block_size, remedy
        self.signature = digest_of_settings(signature)
        # One digit more than the largest number has, as Retro's tools write them.
        digits = len(str(max(num_items, 1))) + 1
        self.blocks = [
            Block(start, stop, folder / f"{start:0{digits}d}-{stop:0{digits}d}.hdf5", number)
            for number, start in enumerate(range(0, num_items, block_size))
            for stop in [min(start + block_size, num_items)]
        ]

    def problem(self, block: Block, *, thorough: bool = True) -> str | None:
        """Why a block has to be computed: missing, damaged, or of another signature. None: it is there.

        Args:
            block: one of :attr:`blocks`.
            thorough: read all of it and compare it with its checksum; otherwise only the signature is compared.
        """
        if not block.path.is_file():
            return "is missing"
        try:
            signature, _ = _read(block.path, None if thorough else ())
        except DataError as error:
            return str(error)
        if signature != self.signature:
            return "is of other settings or other data"
        return None

    def write(self, block: Block, arrays: Arrays) -> None:
        """Write a block, whole or not at all.

        Raises:
            OutputError: the disk is full, or the folder cannot be written.
        """
        write_arrays(block.path, arrays, self.signature)

    def read(self, block: Block, *names: str) -> Arrays:
        """Arrays of a block, all of them where no names are given; compared with their checksum, once by a process
        where it reads some of them.

        Raises:
            DataError: the block is missing, damaged or of another signature.
        """
        if not block.path.is_file():
            raise DataError(f"is missing; {self.remedy}", path=block.path)
        if names:
            check_arrays(block.path)
        signature, arrays = _read(block.path, names or None)
        if signature != self.signature:
            raise DataError(f"is of other settings or other data; {self.remedy}", path=block.path)
        assert arrays is not None
        return arrays

    def clear_leftovers(self) -> None:
        """Remove half-written files and blocks of other sizes; no other process may be writing."""
        known = {block.path.name for block in self.blocks}
        for path in self.folder.glob(".*.tmp"):
            path.unlink(missing_ok=True)
        for path in self.folder.glob("*.hdf5"):
            if path.name not in known:
                path.unlink(missing_ok=True)

    def sample(self, fraction: float, seed: int) -> list[Block]:
        """A random part of the blocks, at least one where there are any, in their order.

        Args:
            fraction: of the blocks.
            seed: chooses them.
        """
        count = min(len(self.blocks), max(1, round(fraction * len(self.blocks))))
        chosen = np.random.default_rng(seed).permutation(len(self.blocks))[:count]
        return [self.blocks[number] for number in sorted(chosen.tolist())]

    def check(self, block: Block, again: Arrays) -> None:
        """Compare a block bit for bit with what is computed now.

        Raises:
            DataError: it is missing, damaged or differs; names it and the array.
        """
        stored = self.read(block)
        for name in sorted(stored.keys() | again.keys()):
            if name not in stored or name not in again or not same_bits(stored[name], again[name]):
                raise DataError(
                    f"{name} differs from what is computed now; delete the file and run its task again", path=block.path
                )

    def remove(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)


def same_bits(first: np.ndarray, second: np.ndarray) -> bool:
    """Whether two arrays have the same type, shape and bytes."""
    return first.dtype == second.dtype and first.shape == second.shape and (first.tobytes() == second.tobytes())


def write_arrays(path: Path, arrays: Arrays, signature: str) -> None:
    """Write named arrays as HDF5 with their checksum, whole or not at all.

    The same arrays give the same bytes: no times are stored, and names are written in their order.

    Raises:
        OutputError: the disk is full, or the folder cannot be written.
    """
    import h5py

    # Made in memory: where a disk fills up under HDF5 the process crashes.
    image = io.BytesIO()
    with h5py.File(image, "w") as file:
        set_text(file, "signature", signature)
        set_text(file, "sha256", digest_of_arrays(arrays))
        for name in sorted(arrays):
            file.create_dataset(name, data=arrays[name])
    try:
        with replacing_path(path) as temporary:
            temporary.write_bytes(image.getbuffer())
    except OSError as error:
        raise cannot_write(path, error) from None


def set_text(file: Any, name: str, text: str) -> None:
    """Set an attribute of an open HDF5 file. Strings of a fixed length stand beside their names; those of any length,
    which h5py makes of a str, stand in a heap, and HDF5 crashes or reads for ever where a bit of a heap is another."""
    file.attrs[name] = np.bytes_(text.encode())


def text_of(file: Any, name: str, default: str | None = None) -> str:
    """An attribute that :func:`set_text` wrote, or an earlier release.

    Raises:
        KeyError: there is none, and no ``default``.
    """
    value = file.attrs[name] if default is None else file.attrs.get(name, default)
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def cannot_write(path: Path, reason: object) -> OutputError:
    """What to say of a full disk, or of a folder that cannot be written."""
    return OutputError(f"cannot be written ({reason}); when there is room, the same command resumes", path=path)


def read_arrays(path: Path) -> Arrays:
    """All arrays of a file that :func:`write_arrays` wrote.

    Raises:
        DataError: it is missing or damaged.
    """
    if not path.is_file():
        raise DataError("is missing", path=path)
    _, arrays = _read(path, None)
    assert arrays is not None
    return arrays


def check_arrays(path: Path, *, remembered: bool = False) -> None:
    """Compare a file that :func:`write_arrays` wrote with its checksum, unless this process did.

    Args:
        path: the file.
        remembered: of a large file only samples are read where any process did so before; else all of it, twice. For
            files that are looked into and never read whole.

    Raises:
        DataError: it is missing or damaged.
    """

    def read() -> str:
        read_arrays(path)
        return "as its checksum says"

    try:
        if remembered and is_sampled(path):
            check_once(path, lambda: content_part(path, "arrays", read))
        else:
            check_once(path, read)
    except FileNotFoundError:
        raise DataError("is missing", path=path) from None


def signature_of(path: Path) -> str | None:
    """The signature in a file; None where it cannot be read."""
    try:
        return _read(path, ())[0]
    except DataError:
        return None


def _read(path: Path, names: tuple[str, ...] | None) -> tuple[str, Arrays | None]:
    """Signature and arrays; with ``names`` None all of them, compared with their checksum."""
    import h5py

    try:
        with h5py.File(path, "r") as file:
            signature, digest = text_of(file, "signature"), text_of(file, "sha256", "")
            arrays = {name: file[name][()] for name in (file if names is None else names)}
            found = digest_of_arrays(arrays) if names is None else digest
    except DAMAGED as error:
        raise DataError(f"cannot be read ({_first_line(error)}); delete it and run its task again", path=path) from None
    if found != digest:
        raise DataError("does not match its checksum; delete it and run its task again", path=path)
    return signature, arrays


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def shares(blocks: list[Block], rank: int, world_size: int) -> Iterator[Block]:
    """The blocks of one process among several."""
    yield from blocks[rank::world_size]
