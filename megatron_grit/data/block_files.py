"""A long computation as a folder of blocks: what is there is kept, what is missing or damaged is done again.

The items [0, n) are cut into blocks of a fixed size, one HDF5 file each, named by its first item and the one after its
last: ``000000-100000.hdf5``. A block is written under another name and renamed, so it is whole or not there, and holds
the SHA-256 of its arrays and a signature of everything that its content follows from. So a run that was killed goes on,
and a block of other settings or other data is not taken for one of this run.

Which process computes a block never changes what is in it, so the folder is the same whatever the number of processes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_grit.errors import DataError
from megatron_grit.files import replacing_path

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Block:
    """Items ``start`` to ``stop - 1`` and their file."""

    start: int
    stop: int
    path: Path

    def __len__(self) -> int:
        return self.stop - self.start


class BlockFolder:
    """Blocks of one computation.

    Args:
        folder: made where it is not there.
        num_items: n.
        block_size: items of a block; the last one may have fewer.
        signature: of all that the content follows from: settings, and fingerprints of what is read.
    """

    def __init__(self, folder: Path, num_items: int, block_size: int, signature: Mapping[str, Any]) -> None:
        self.folder, self.num_items, self.block_size = folder, num_items, block_size
        self.signature = digest_of_settings(signature)
        # One digit more than the largest number has, as Retro's tools write them.
        digits = len(str(max(num_items, 1))) + 1
        self.blocks = [
            Block(start, stop, folder / f"{start:0{digits}d}-{stop:0{digits}d}.hdf5")
            for start in range(0, num_items, block_size)
            for stop in [min(start + block_size, num_items)]
        ]

    def missing(self, *, thorough: bool = True) -> list[Block]:
        """Blocks that are yet to be computed: not there, damaged, or of another signature.

        Args:
            thorough: read every block whole and compare it with its checksum, not only its signature.
        """
        return [block for block in self.blocks if self.problem(block, thorough=thorough) is not None]

    def problem(self, block: Block, *, thorough: bool = True) -> str | None:
        """What is wrong with a block's file. None: nothing."""
        if not block.path.is_file():
            return "is missing"
        try:
            signature, arrays = _read(block.path, None if thorough else ())
        except DataError as error:
            return str(error)
        if signature != self.signature:
            return "is of other settings or other data"
        return None if not thorough or arrays is not None else "is damaged"

    def write(self, block: Block, arrays: Arrays) -> None:
        """Write a block, whole or not at all.

        Raises:
            OSError: the disk is full, or the folder cannot be written.
        """
        write_arrays(block.path, arrays, self.signature)

    def read(self, block: Block, *names: str) -> Arrays:
        """Arrays of a block; all of them, checked, where no names are given.

        Raises:
            DataError: the block is missing, damaged or of another signature.
        """
        if not block.path.is_file():
            raise DataError("is missing; run the task that makes it", path=block.path)
        signature, arrays = _read(block.path, names or None)
        if signature != self.signature:
            raise DataError("is of other settings or other data; run the task that makes it again", path=block.path)
        assert arrays is not None
        return arrays

    def clear_leftovers(self) -> None:
        """Remove half-written files and blocks of other sizes. While no other process writes."""
        known = {block.path.name for block in self.blocks}
        for path in self.folder.glob(".*.tmp"):
            path.unlink(missing_ok=True)
        for path in self.folder.glob("*.hdf5"):
            if path.name not in known:
                path.unlink(missing_ok=True)

    def validate(self, fraction: float, compute: Callable[[Block], Arrays], seed: int) -> int:
        """Compute a random part of the blocks again and compare bit for bit. Returns how many were compared.

        Args:
            fraction: of the blocks; at least one is taken.
            compute: makes a block's arrays.
            seed: chooses the blocks.

        Raises:
            DataError: a block is missing or differs; names it and the array.
        """
        count = max(1, round(fraction * len(self.blocks))) if self.blocks else 0
        chosen = np.random.default_rng(seed).choice(len(self.blocks), count, replace=False) if count else []
        for number in sorted(int(number) for number in chosen):
            block = self.blocks[number]
            stored, again = self.read(block), compute(block)
            for name in sorted(stored.keys() | again.keys()):
                if name not in stored or name not in again or not same_bits(stored[name], again[name]):
                    raise DataError(f"{name} differs from what is computed now; delete the file", path=block.path)
        return count


def same_bits(first: np.ndarray, second: np.ndarray) -> bool:
    """Whether two arrays have the same type, shape and bytes."""
    return first.dtype == second.dtype and first.shape == second.shape and (first.tobytes() == second.tobytes())


def digest_of_settings(settings: Mapping[str, Any]) -> str:
    """SHA-256 of settings that JSON can hold."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def digest_of_arrays(arrays: Arrays) -> str:
    """SHA-256 of names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(array.data.cast("B") if array.size else b"")
    return digest.hexdigest()


def write_arrays(path: Path, arrays: Arrays, signature: str) -> None:
    """Write named arrays as HDF5 with their checksum, whole or not at all.

    The same arrays give the same bytes: no times are stored, and names are written in their order.
    """
    import h5py

    with replacing_path(path) as temporary, h5py.File(temporary, "w") as file:
        file.attrs["signature"] = signature
        file.attrs["sha256"] = digest_of_arrays(arrays)
        for name in sorted(arrays):
            file.create_dataset(name, data=arrays[name])


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


def _read(path: Path, names: tuple[str, ...] | None) -> tuple[str, Arrays | None]:
    """Signature and arrays; with ``names`` None all of them, compared with their checksum."""
    import h5py

    try:
        with h5py.File(path, "r") as file:
            signature, digest = str(file.attrs["signature"]), str(file.attrs["sha256"])
            arrays = {name: file[name][()] for name in (file if names is None else names)}
    except (OSError, KeyError, RuntimeError, ValueError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"cannot be read ({first}); delete it and run its task again", path=path) from None
    if names is None and digest_of_arrays(arrays) != digest:
        raise DataError("does not match its checksum; delete it and run its task again", path=path)
    return signature, arrays


def shares(blocks: list[Block], rank: int, world_size: int) -> Iterator[Block]:
    """The blocks of one process among several."""
    yield from blocks[rank::world_size]
