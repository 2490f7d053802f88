"""Chunks that stand in a database more than once, or nearly so, found on disk.

1. Keys: for each block of chunks, one sorted list of 64-bit keys for the hashes of the chunks and one for each band of
   their signatures (:mod:`~megatron_grit.retrieval.dedup.buckets`): 12 bytes a chunk and list, until
   duplicates are found.
2. Equal chunks: the space of keys is cut into parts; a part reads its piece of every block's list, and compares whole
   hashes of chunks with equal keys.
3. Similar chunks: the same for each band, without the chunks that are equal to an earlier one.

Processes share the key and part blocks; a killed run resumes from the finished ones. A process holds a block of
chunks or :data:`ENTRIES_IN_MEMORY` keys, 16 bytes for each chunk that a part leaves out, and where it reads or makes
the state of all chunks, a byte for each; states are mapped while parts are computed.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_grit.config.database.schema import RetroDbConfig
from megatron_grit.data.chunks.chunk_db import map_dataset
from megatron_grit.errors import DataError
from megatron_grit.retrieval.dedup.buckets import Entries, band_keys, choose_bands, cut_runs, find_pairs
from megatron_grit.retrieval.work import Worker, compute_blocks
from megatron_grit.store.blocks import Arrays, Block, BlockFolder, read_arrays
from megatron_grit.store.files import replacing

EQUAL, SIMILAR = 1, 2
ENTRIES_IN_MEMORY = 1 << 23
"""Keys that a process sorts at a time, about 50 bytes each."""
_MAPPED_ARRAYS = 48_000
"""Of all blocks, as long as there are no more than 16,000: keys, rows and signatures of each. A process may have 65,530
maps where the system's limit is the usual one."""


@dataclass(frozen=True)
class ChunkBlock:
    """A block of chunks, with ``hashes`` and, for near duplicates, ``minhashes``."""

    path: Path
    signature: str
    """Of its content."""


class DuplicateSearch:
    """Which chunks of a list of blocks are duplicates of one before them.

    A chunk is a near duplicate where at least ``near_threshold`` of its signature equals that of an earlier chunk that
    leads a bucket of one of its bands, whether or not that chunk is kept itself. So the first of a chain of similar
    chunks is kept, and which chunks are left out depends neither on the order of comparisons nor on the number of
    processes, only on the order of chunks. See :func:`~megatron_grit.retrieval.dedup.buckets.find_pairs`, which also
    says how many leaders a bucket has.

    Args:
        config: of the database.
        folder: for what is computed on the way; it may be deleted when the result was read.
        blocks: in the order of their chunks.
        num_old_blocks: chunks of so many first blocks are in the database already and are not left out.

    Raises:
        DataError: a block is missing or damaged.
    """

    def __init__(
        self, config: RetroDbConfig, folder: Path, blocks: Sequence[ChunkBlock], num_old_blocks: int = 0
    ) -> None:
        self.blocks = list(blocks)
        self.mode, self.threshold = config.duplicates, config.near_threshold
        self.bands = choose_bands(config.near_threshold, config.minhash_permutations)
        # Every part reads of every block; a process opens each of them once.
        # Blocks of chunks are compared with their checksums where keys are made of them, keys when they are written.
        self._map = functools.lru_cache(maxsize=_MAPPED_ARRAYS)(functools.partial(map_dataset, compare=False))
        self._ends = np.cumsum([len(self._map(block.path, "hashes")) for block in self.blocks], dtype=np.int64)
        """Chunks up to the end of each block."""
        self.num_chunks = int(self._ends[-1]) if self.blocks else 0
        self.first_new = int(self._ends[num_old_blocks - 1]) if num_old_blocks else 0
        is_near = self.mode == "near"
        if is_near:
            self._check_signatures(config.minhash_permutations)
        # Where keys spread evenly a part takes half of what fits.
        self._num_parts = -(-2 * self.num_chunks // ENTRIES_IN_MEMORY)
        chunks = [block.signature for block in self.blocks]
        signature: dict[str, Any] = {"task": "duplicate_keys", "chunks": chunks, "near": is_near, **vars(self.bands)}
        self._keys = BlockFolder(folder / "keys", len(self.blocks), 1, signature)
        signature = {"task": "duplicates", "keys": self._keys.signature, "first_new": self.first_new}
        signature |= {"num_parts": self._num_parts}
        self._equal = BlockFolder(folder / "equal", self._num_parts, 1, signature)
        num_similar = self.bands.count * self._num_parts if is_near else 0
        self._similar = BlockFolder(folder / "similar", num_similar, 1, {**signature, "near_threshold": self.threshold})
        self._state_path = folder / "equal.npy"

    def _check_signatures(self, num_permutations: int) -> None:
        for block in self.blocks:
            columns = self._map(block.path, "minhashes").shape[1]
            if columns != num_permutations:
                raise DataError(
                    f"has signatures of {columns} numbers, but minhash_permutations is {num_permutations}; set it to "
                    f"{columns}",
                    path=block.path,
                )

    def run(self, worker: Worker) -> None:
        """Compare chunks. All processes call it.

        Raises:
            DataError: a block of chunks is damaged, or the disk is full.
        """
        if self.mode == "keep" or not self.num_chunks:
            return
        compute_blocks(self._keys, self._make_keys, worker, "keys of chunks", "block")
        compute_blocks(self._equal, self._find_equal, worker, "exact duplicates", "part")
        if self.mode == "near":
            if worker.is_first:
                with replacing(self._state_path, "wb") as file:
                    np.save(file, self._equal_state(), allow_pickle=False)
            worker.barrier()
            compute_blocks(self._similar, self._find_similar, worker, "near duplicates", "part")

    def state(self) -> np.ndarray:
        """What was found, for each chunk: uint8 [chunks], 0, EQUAL or SIMILAR."""
        state = self._equal_state()
        for pairs in self._pairs(self._similar):
            state[pairs[:, 0]] = SIMILAR
        return state

    def examples(self, state: np.ndarray, count: int) -> list[tuple[int, int]]:
        """Near duplicates: a chunk that is kept, and one that was left out because of it; at most ``count``."""
        found: dict[int, int] = {}
        for pairs in self._pairs(self._similar):
            for chunk, leader in pairs[state[pairs[:, 1]] == 0][:count].tolist():
                found.setdefault(chunk, leader)
            if len(found) >= count:
                break
        return [(leader, chunk) for chunk, leader in sorted(found.items())[:count]]

    def place(self, chunk: int) -> tuple[int, int]:
        """The block that holds a chunk, and its row there."""
        number = int(np.searchsorted(self._ends, chunk, side="right"))
        return number, chunk - self._start(number)

    def _start(self, number: int) -> int:
        return int(self._ends[number - 1]) if number else 0

    def _equal_state(self) -> np.ndarray:
        state = np.zeros(self.num_chunks, dtype=np.uint8)
        if self.mode != "keep":
            for pairs in self._pairs(self._equal):
                state[pairs[:, 0]] = EQUAL
        return state

    def _pairs(self, folder: BlockFolder) -> Iterator[np.ndarray]:
        for block in folder.blocks:
            yield folder.read(block)["pairs"]

    def _make_keys(self, block: Block) -> Arrays:
        """Keys of a block of chunks, uint64 [lists, chunks], each list sorted, and their rows, uint32."""
        arrays = read_arrays(self.blocks[block.start].path)
        keys = arrays["hashes"][:, 0][None]
        if self.mode == "near":
            keys = np.concatenate([keys, band_keys(arrays["minhashes"], self.bands)])
        rows = np.argsort(keys, axis=1, kind="stable")
        return {"keys": np.take_along_axis(keys, rows, axis=1), "rows": rows.astype(np.uint32)}

    def _find_equal(self, block: Block) -> Arrays:
        entries = self._entries(0, *self._range(block.start), None)
        gather = functools.partial(self._gather, "hashes")
        return {"pairs": find_pairs(entries, gather, 1.0, first_new=self.first_new)}

    def _find_similar(self, block: Block) -> Arrays:
        band, part = divmod(block.start, self._num_parts)
        equal = np.load(self._state_path, mmap_mode="r", allow_pickle=False)
        entries = self._entries(1 + band, *self._range(part), equal)
        gather = functools.partial(self._gather, "minhashes")
        return {"pairs": find_pairs(entries, gather, self.threshold, first_new=self.first_new)}

    def _range(self, part: int) -> tuple[int, int]:
        """First and last key of a part."""
        first, stop = ((number << 64) // self._num_parts for number in (part, part + 1))
        return first, stop - 1

    def _entries(self, row: int, first: int, last: int, equal: np.ndarray | None) -> Iterator[Entries]:
        """The sorted keys from ``first`` to ``last`` of all blocks, :data:`ENTRIES_IN_MEMORY` at most at a time."""
        runs = []
        for number, block in enumerate(self._keys.blocks):
            keys = self._map(block.path, "keys")[row]
            start = int(np.searchsorted(keys, np.uint64(first), side="left"))
            runs.append((number, start, int(np.searchsorted(keys, np.uint64(last), side="right"))))
        if first < last and sum(stop - start for _, start, stop in runs) > ENTRIES_IN_MEMORY:
            middle = (first + last) // 2
            yield from self._entries(row, first, middle, equal)
            yield from self._entries(row, middle + 1, last, equal)
            return
        for part in cut_runs(runs, ENTRIES_IN_MEMORY):  # more than one where all keys are the same
            yield self._load(row, part, equal)

    def _load(self, row: int, part: list[tuple[int, int, int]], equal: np.ndarray | None) -> Entries:
        keys, chunks = [], []
        for number, start, stop in part:
            path = self._keys.blocks[number].path
            keys.append(self._map(path, "keys")[row, start:stop])
            chunks.append(self._map(path, "rows")[row, start:stop] + np.int64(self._start(number)))
        joined, of = np.concatenate(keys), np.concatenate(chunks)
        if equal is not None:
            rest = equal[of] == 0
            joined, of = joined[rest], of[rest]
        # Stable: chunks of one key stay in their order.
        order = np.argsort(joined, kind="stable")
        return joined[order], of[order]

    def _gather(self, name: str, chunks: np.ndarray) -> np.ndarray:
        """Rows of an array of chunks, read block after block in the order in which they lie there."""
        order = np.argsort(chunks, kind="stable")
        ascending = chunks[order]
        bounds = np.searchsorted(ascending, self._ends)
        out: np.ndarray | None = None
        start = 0
        for number in np.flatnonzero(np.diff(bounds, prepend=0)).tolist():
            table, stop = self._map(self.blocks[number].path, name), int(bounds[number])
            if out is None:
                out = np.empty((len(chunks), table.shape[1]), dtype=table.dtype)
            out[order[start:stop]] = table[ascending[start:stop] - self._start(number)]
            start = stop
        assert out is not None
        return out
