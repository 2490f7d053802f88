"""The keys of chunks, sorted on disk and kept, so that whoever adds chunks looks those of earlier ones up.

A list of keys is one for the hashes of the chunks, and one for each band of their signatures
(:mod:`~megatron_grit.retrieval.dedup.buckets`). Each list is cut by ranges of the key into parts, a file each. They
are made in two passes: a run is a few blocks of chunks with all their keys, each list sorted; a part is what all runs
hold of its range. A process opens a run once, and a part is opened once by whoever needs it.

The lists follow from the chunks alone: neither from other chunks, nor from what was removed, nor from the processes.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megatron_grit.config.database.schema import RetroDbConfig
from megatron_grit.data.chunks.chunk_db import map_dataset
from megatron_grit.errors import DataError
from megatron_grit.retrieval.dedup.buckets import band_keys, choose_bands
from megatron_grit.retrieval.work import Worker, compute_blocks
from megatron_grit.store.blocks import Arrays, Block, BlockFolder, check_arrays, read_arrays, signature_of, write_arrays
from megatron_grit.store.digest import digest_of_settings
from megatron_grit.store.files import replacing

ENTRIES_IN_MEMORY = 1 << 23
"""Keys that a process sorts at a time, about 50 bytes each, where keys are of different chunks."""
MOST_RUNS = 8_000
_MAPPED_ARRAYS = 48_000
"""That a process keeps open: two of each run, and the signatures of as many as 32,000 blocks. It may have 65,530 maps
where the system's limit is the usual one."""
HASHES = 0
"""The list of hashes; the list of band b is b + 1."""
_REMEDY = "run the same command again"


@dataclass(frozen=True)
class ChunkBlock:
    """A block of chunks, with ``hashes`` and, for near duplicates, ``minhashes``."""

    path: Path
    signature: str
    """Of its content."""


class Entries(NamedTuple):
    """Of a list, by ascending keys, and by ascending chunks within a key; of hashes, within a hash."""

    keys: np.ndarray
    """uint64 [n]."""
    chunks: np.ndarray
    """int64 [n]."""
    repeats: np.ndarray
    """bool [n]: an earlier one of these chunks has the same hash."""
    rest: np.ndarray
    """uint64 [n], second half of the hash; of bands [0]."""


class KeyedChunks:
    """The chunks of a first build, or those of an addition, and their keys.

    Args:
        config: of the database.
        folder: where the lists are kept. It may be deleted: they are made again where they are needed.
        blocks: in the order of their chunks.

    Attributes:
        ends: chunks up to the end of each block.

    Raises:
        DataError: a block is missing or damaged.
    """

    def __init__(self, config: RetroDbConfig, folder: Path, blocks: Sequence[ChunkBlock]) -> None:
        self.blocks, self.folder, self.is_near = list(blocks), folder, config.duplicates == "near"
        self.bands = choose_bands(config.near_threshold, config.minhash_permutations)
        self._num_permutations = config.minhash_permutations
        # A process opens each of them once. Blocks are compared with their checksums before, or by :meth:`check`.
        self._map = functools.lru_cache(maxsize=_MAPPED_ARRAYS)(functools.partial(map_dataset, compare=False))
        signature: dict[str, Any] = {"task": "duplicate_keys", "chunks": [block.signature for block in self.blocks]}
        signature |= {"near": self.is_near, "entries": ENTRIES_IN_MEMORY, **vars(self.bands)}
        self._seal, self._signature = folder / "chunks.hdf5", digest_of_settings(signature)
        self._is_sealed = signature_of(self._seal) == self._signature
        self._made_here = False
        self.ends = self._count()
        self.num_chunks = int(self.ends[-1]) if self.blocks else 0
        # Where keys spread evenly a part takes half of what fits.
        self.num_parts = -(-2 * self.num_chunks // ENTRIES_IN_MEMORY)
        self._first_keys = np.array([(part << 64) // self.num_parts for part in range(self.num_parts)], dtype=np.uint64)
        self._groups = self._cut_groups()
        self._runs = BlockFolder(folder / "runs", len(self._groups), 1, signature)
        self._hashes = BlockFolder(folder / "hashes", self.num_parts, 1, signature)
        num_bands = self.bands.count * self.num_parts if self.is_near else 0
        self._of_bands = BlockFolder(folder / "bands", num_bands, 1, signature)
        self._repeats = folder / "repeats.npy"

    @property
    def signature(self) -> str:
        """Of what the lists follow from."""
        return self._signature

    def _count(self) -> np.ndarray:
        if self._is_sealed:
            try:
                return read_arrays(self._seal)["ends"]
            except DataError:
                self._is_sealed = False
        # Of the two arrays the one that a process opens in any case.
        name = "minhashes" if self.is_near else "hashes"
        ends = np.cumsum([len(self._map(block.path, name)) for block in self.blocks], dtype=np.int64)
        for block in self.blocks if self.is_near else ():
            columns = self._map(block.path, name).shape[1]
            if columns != self._num_permutations:
                raise DataError(
                    f"has signatures of {columns} numbers, but minhash_permutations is {self._num_permutations}; set "
                    f"it to {columns}",
                    path=block.path,
                )
        return ends

    def _cut_groups(self) -> list[tuple[int, int]]:
        """First block of each run, and the one after its last: as many as fit into memory, and more where there would
        be more than :data:`MOST_RUNS` runs."""
        num_lists = 1 + (self.bands.count if self.is_near else 0)
        most = max(ENTRIES_IN_MEMORY // (2 * num_lists), -(-self.num_chunks // MOST_RUNS))
        groups, first = [], 0
        for number in range(len(self.blocks)):
            start = int(self.ends[first - 1]) if first else 0
            if number > first and self.ends[number] - start > most:
                groups.append((first, number))
                first = number
        return [*groups, (first, len(self.blocks))] if self.blocks else []

    def make(self, worker: Worker) -> None:
        """Make the lists, if they are not there. All processes call it.

        Raises:
            DataError: a block of chunks is damaged, or the disk is full.
        """
        if not self.num_chunks:
            return
        if worker.from_first(self._is_made):
            if worker.is_first:
                self._remove_passing()
            return
        if worker.is_first:
            # It said that the lists are there, and names alone are looked at.
            self._seal.unlink(missing_ok=True)
        worker.barrier()
        self._made_here = True
        compute_blocks(self._runs, self._make_run, worker, "keys of chunks", "run")
        compute_blocks(self._hashes, self._list_hashes, worker, "hashes of chunks", "part")
        if self.is_near:
            if worker.is_first:
                with replacing(self._repeats, "wb") as file:
                    np.save(file, self.repeats(), allow_pickle=False)
            worker.barrier()
            compute_blocks(self._of_bands, self._list_band, worker, "bands of chunks", "part")
        if worker.is_first:
            # The last, for it says that the others are there.
            write_arrays(self._seal, {"ends": self.ends}, self._signature)
            self._remove_passing()
        worker.barrier()

    def _remove_passing(self) -> None:
        """What lists are made of. A run that was killed after it had made them leaves it."""
        self._runs.remove()
        self._repeats.unlink(missing_ok=True)

    def _is_made(self) -> bool:
        """Whether the lists are there. Looks at names alone: whoever looks a key up compares its part's checksum."""
        folders = (self._hashes, self._of_bands)
        return self._is_sealed and all(
            {block.path.name for block in folder.blocks} <= {path.name for path in folder.folder.glob("*.hdf5")}
            for folder in folders
        )

    def check(self, worker: Worker) -> None:
        """Compare all blocks of chunks with their checksums, by samples where these are remembered. All processes call
        it, before they :meth:`gather` of blocks whose lists were made by an earlier run.

        Raises:
            DataError: a block is damaged.
        """
        for block in self.blocks[worker.rank :: worker.world_size]:
            check_arrays(block.path, remembered=True)
        worker.barrier()

    def repeats(self) -> np.ndarray:
        """Whether an earlier one of these chunks has the same hash: bool [chunks]."""
        found = np.zeros(self.num_chunks, dtype=bool)
        for block in self._hashes.blocks:
            if not self._made_here:
                check_arrays(block.path, remembered=True)
            found[map_dataset(block.path, "repeats", compare=False)] = True
        return found

    def entries(self, number: int, part: int) -> Entries:
        """Those of a part of a list."""
        folder, at = (
            (self._hashes, part) if number == HASHES else (self._of_bands, (number - 1) * self.num_parts + part)
        )
        return _decoded(*self._arrays(folder.blocks[at].path, number, compare=not self._made_here))

    def look_up(self, number: int, keys: np.ndarray) -> Entries:
        """Those entries of a list that have one of some keys. Reads of the other ones what a binary search passes.

        Args:
            number: of the list.
            keys: uint64 [n], ascending.

        Raises:
            DataError: a part is missing or damaged.
        """
        wanted = keys[np.concatenate([[True], keys[1:] != keys[:-1]])] if len(keys) else keys
        bounds = [*np.searchsorted(wanted, self._first_keys).tolist(), len(wanted)]
        found = [_decoded(*(np.empty(0, kind) for kind in (np.uint64, np.int64, np.uint64)))]
        folder, first = (self._hashes, 0) if number == HASHES else (self._of_bands, (number - 1) * self.num_parts)
        for part, (start, stop) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
            if start == stop:
                continue
            there, chunks, rest = self._arrays(folder.blocks[first + part].path, number, compare=True)
            begins = np.searchsorted(there, wanted[start:stop], side="left")
            sizes = np.searchsorted(there, wanted[start:stop], side="right") - begins
            places = np.repeat(begins - np.cumsum(sizes) + sizes, sizes) + np.arange(sizes.sum())
            found.append(_decoded(there[places], chunks[places], rest[places] if len(rest) else rest))
        return Entries(*(np.concatenate(column) for column in zip(*found, strict=True)))

    def gather(self, name: str, chunks: np.ndarray) -> np.ndarray:
        """Rows of an array of the blocks, read block after block in the order in which they lie there.

        Args:
            name: of the array.
            chunks: int64 [n], in any order.
        """
        order = np.argsort(chunks, kind="stable")
        ascending = chunks[order]
        bounds = np.searchsorted(ascending, self.ends)
        parts, start = [], 0
        for number in np.flatnonzero(np.diff(bounds, prepend=0)).tolist():
            table, stop = self._map(self.blocks[number].path, name), int(bounds[number])
            parts.append(table[ascending[start:stop] - self._start(number)])
            start = stop
        if not parts:
            return self._map(self.blocks[0].path, name)[:0]
        out = np.empty((len(chunks), *parts[0].shape[1:]), dtype=parts[0].dtype)
        out[order] = np.concatenate(parts)
        return out

    def place(self, chunk: int) -> tuple[int, int]:
        """The block that holds a chunk, and its row there."""
        number = int(np.searchsorted(self.ends, chunk, side="right"))
        return number, chunk - self._start(number)

    def _start(self, number: int) -> int:
        return int(self.ends[number - 1]) if number else 0

    def _make_run(self, block: Block) -> Arrays:
        """Keys of a run of chunks, uint64 [lists, chunks], each list sorted, and their rows, uint32. Of hashes there
        are both halves."""
        hashes, signatures = [], []
        for chunks in self.blocks[slice(*self._groups[block.start])]:
            check_arrays(chunks.path, remembered=True)
            hashes.append(np.asarray(self._map(chunks.path, "hashes")))
            if self.is_near:
                signatures.append(band_keys(self._map(chunks.path, "minhashes"), self.bands))
        halves = np.concatenate(hashes)
        keys = np.concatenate([halves[:, 0][None], *([np.concatenate(signatures, axis=1)] if signatures else [])])
        rows = np.argsort(keys, axis=1, kind="stable")
        ordered = np.take_along_axis(keys, rows, axis=1)
        second = halves[:, 1][rows[HASHES]][None]
        return {"keys": np.concatenate([ordered, second]), "rows": rows.astype(np.uint32)}

    def _of_runs(self, number: int, part: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Keys, chunks and second halves of a part of a list, run after run."""
        first, last = self._first_keys[part], None
        if part + 1 < self.num_parts:
            last = self._first_keys[part + 1]
        keys, chunks, rest = [], [], []
        for run, (first_block, _) in zip(self._runs.blocks, self._groups, strict=True):
            table = self._map(run.path, "keys")
            row = table[number]
            start = int(np.searchsorted(row, first))
            stop = len(row) if last is None else int(np.searchsorted(row, last))
            keys.append(row[start:stop])
            rows = self._map(run.path, "rows")[number, start:stop]
            chunks.append(rows + np.int64(self._start(first_block)))
            rest.append(table[-1, start:stop] if number == HASHES else row[:0])
        return np.concatenate(keys), np.concatenate(chunks), np.concatenate(rest)

    def _list_hashes(self, block: Block) -> Arrays:
        keys, chunks, second = self._of_runs(HASHES, block.start)
        # Stable: chunks of one hash stay in their order.
        order = np.lexsort((second, keys))
        keys, chunks, second = keys[order], chunks[order], second[order]
        is_repeat = np.zeros(len(keys), dtype=bool)
        is_repeat[1:] = (keys[1:] == keys[:-1]) & (second[1:] == second[:-1])
        arrays = {"keys": keys, "chunks": self._encoded(chunks, is_repeat), "second": second}
        return arrays | {"repeats": chunks[is_repeat]}

    def _list_band(self, block: Block) -> Arrays:
        band, part = divmod(block.start, self.num_parts)
        keys, chunks, _ = self._of_runs(1 + band, part)
        order = np.argsort(keys, kind="stable")
        chunks = chunks[order]
        is_repeat = np.load(self._repeats, mmap_mode="r", allow_pickle=False)[chunks]
        return {"keys": keys[order], "chunks": self._encoded(chunks, is_repeat)}

    def _encoded(self, chunks: np.ndarray, is_repeat: np.ndarray) -> np.ndarray:
        """Repeats as ``-1 - chunk``."""
        kind = np.int32 if self.num_chunks < 1 << 31 else np.int64
        return np.where(is_repeat, -1 - chunks, chunks).astype(kind)

    def _arrays(self, path: Path, number: int, *, compare: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if compare:
            check_arrays(path, remembered=True)
        names = ("keys", "chunks", "second") if number == HASHES else ("keys", "chunks")
        keys, chunks, *rest = (map_dataset(path, name, _REMEDY, compare=False) for name in names)
        return keys, chunks, rest[0] if rest else np.empty(0, np.uint64)


def _decoded(keys: np.ndarray, chunks: np.ndarray, rest: np.ndarray) -> Entries:
    coded = chunks.astype(np.int64)
    is_repeat = coded < 0
    return Entries(np.asarray(keys), np.where(is_repeat, -1 - coded, coded), is_repeat, np.asarray(rest))
