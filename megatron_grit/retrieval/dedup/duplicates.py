"""Chunks that stand in a database more than once, or nearly so, found on disk.

1. Keys: sorted lists of 64-bit keys, one for the hashes of the chunks and one for each band of their signatures, cut
   by ranges of the key into files (:mod:`~megatron_grit.retrieval.dedup.keys`). They are kept.
2. Equal chunks: those whose hash an earlier one in the list has; of an addition, whole hashes are looked up in the
   lists of what the database has.
3. Similar chunks: each part of each band by itself, without the chunks that are equal to an earlier one; of an
   addition, with the earlier chunks that have one of its keys.

Processes share runs and parts; a killed run resumes from the finished ones. A process holds a block of chunks or
:data:`~megatron_grit.retrieval.dedup.keys.ENTRIES_IN_MEMORY` keys (and more only where so many chunks have one key), 16
bytes for each chunk that a part leaves out, and where it reads or makes the state of all chunks, a byte for each;
states are mapped while parts are computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_grit.config.database.schema import RetroDbConfig
from megatron_grit.retrieval.dedup.buckets import find_pairs
from megatron_grit.retrieval.dedup.keys import HASHES, ChunkBlock, Entries, KeyedChunks
from megatron_grit.retrieval.work import Worker, compute_blocks
from megatron_grit.store.blocks import Arrays, Block, BlockFolder
from megatron_grit.store.files import replacing

EQUAL, SIMILAR = 1, 2


@dataclass(frozen=True)
class KnownChunks:
    """Chunks that a database has already."""

    chunks: KeyedChunks
    is_live: Callable[[np.ndarray], np.ndarray] | None = None
    """Of chunks, int64 [n], which ones a new one may be a duplicate of: bool [n]. None: all."""


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
        kept: for the lists of keys, where those that come later look them up.
        blocks: in the order of their chunks.
        earlier: what the database has, in the order in which it came.

    Raises:
        DataError: a block is missing or damaged.
    """

    def __init__(
        self,
        config: RetroDbConfig,
        folder: Path,
        kept: Path,
        blocks: Sequence[ChunkBlock],
        earlier: Sequence[KnownChunks] = (),
    ) -> None:
        self.mode, self.threshold = config.duplicates, config.near_threshold
        self.chunks, self.earlier = KeyedChunks(config, kept, blocks), list(earlier)
        self.num_chunks, num_parts = self.chunks.num_chunks, self.chunks.num_parts
        counts = [each.chunks.num_chunks for each in self.earlier]
        self._firsts = np.cumsum([0, *counts], dtype=np.int64)
        """Number of the first chunk of each of the earlier ones, and of the new ones, in pairs."""
        signature: dict[str, Any] = {"task": "duplicates", "keys": self.chunks.signature, "num_parts": num_parts}
        signature["earlier"] = [each.chunks.signature for each in self.earlier]
        self._known = BlockFolder(folder / "equal", num_parts if self.earlier else 0, 1, signature)
        num_similar = self.chunks.bands.count * num_parts if self.mode == "near" else 0
        self._similar = BlockFolder(folder / "similar", num_similar, 1, {**signature, "near_threshold": self.threshold})
        self._state_path = folder / "equal.npy"

    def run(self, worker: Worker) -> None:
        """Compare chunks. All processes call it.

        Raises:
            DataError: a block of chunks or a list of keys is damaged, or the disk is full.
        """
        if self.mode == "keep" or not self.num_chunks:
            return
        for each in self.earlier:
            each.chunks.make(worker)
            if self.mode == "near" or each.is_live is not None:
                each.chunks.check(worker)
        self.chunks.make(worker)
        compute_blocks(self._known, self._find_known, worker, "exact duplicates", "part")
        if self.mode == "near":
            if worker.is_first:
                with replacing(self._state_path, "wb") as file:
                    np.save(file, self._equal_state(), allow_pickle=False)
            worker.barrier()
            compute_blocks(self._similar, self._find_similar, worker, "near duplicates", "part")

    def state(self) -> np.ndarray:
        """What was found, for each chunk: uint8 [chunks], 0, EQUAL or SIMILAR."""
        state = self._equal_state()
        for pairs in self._pairs():
            state[pairs[:, 0]] = SIMILAR
        return state

    def examples(self, state: np.ndarray, count: int) -> list[tuple[int, int]]:
        """Near duplicates: a chunk that is kept, and one that was left out because of it; at most ``count``. Without
        those of earlier chunks."""
        found: dict[int, int] = {}
        for pairs in self._pairs():
            own = pairs[pairs[:, 1] >= 0]
            for chunk, leader in own[state[own[:, 1]] == 0][:count].tolist():
                found.setdefault(chunk, leader)
            if len(found) >= count:
                break
        return [(leader, chunk) for chunk, leader in sorted(found.items())[:count]]

    def place(self, chunk: int) -> tuple[int, int]:
        """The block that holds a chunk, and its row there."""
        return self.chunks.place(chunk)

    def _equal_state(self) -> np.ndarray:
        if self.mode == "keep" or not self.num_chunks:
            return np.zeros(self.num_chunks, dtype=np.uint8)
        state = np.where(self.chunks.repeats(), np.uint8(EQUAL), np.uint8(0))
        for block in self._known.blocks:
            state[self._known.read(block)["chunks"]] = EQUAL
        return state

    def _pairs(self) -> Iterator[np.ndarray]:
        for block in self._similar.blocks:
            yield self._similar.read(block)["pairs"]

    def _find_known(self, block: Block) -> Arrays:
        """Chunks of a part that are equal to one of the database, int64 [n]."""
        own = self.chunks.entries(HASHES, block.start)
        found = np.zeros(len(own.keys), dtype=bool)
        for each in self.earlier:
            known = _live(each, each.chunks.look_up(HASHES, own.keys))
            hashes = np.stack([known.keys, known.rest], axis=1)
            found |= _rows_among(np.stack([own.keys, own.rest], axis=1), hashes)
        return {"chunks": own.chunks[found]}

    def _find_similar(self, block: Block) -> Arrays:
        """Pairs of a part of a band, int64 [n, 2]: a chunk, and the one because of which it is left out, which is
        negative where the database has it."""
        band, part = divmod(block.start, self.chunks.num_parts)
        equal = np.load(self._state_path, mmap_mode="r", allow_pickle=False)
        own = self.chunks.entries(1 + band, part)
        rest = equal[own.chunks] == 0
        first_new = self._firsts[-1]
        keys, rows = [own.keys[rest]], [own.chunks[rest] + first_new]
        for each, first in zip(self.earlier, self._firsts[:-1], strict=True):
            known = _live(each, each.chunks.look_up(1 + band, own.keys[rest]))
            keys.append(known.keys)
            rows.append(known.chunks + first)
        joined, of = np.concatenate(keys), np.concatenate(rows)
        order = np.lexsort((of, joined))
        pairs = find_pairs([(joined[order], of[order])], self._signatures, self.threshold, first_new=int(first_new))
        return {"pairs": pairs - first_new}

    def _signatures(self, rows: np.ndarray) -> np.ndarray:
        """Of chunks by their numbers in pairs."""
        sources = [*(each.chunks for each in self.earlier), self.chunks]
        of = np.searchsorted(self._firsts, rows, side="right") - 1
        out: np.ndarray | None = None
        for number in np.unique(of).tolist():
            found = sources[number].gather("minhashes", rows[of == number] - self._firsts[number])
            if out is None:
                out = np.empty((len(rows), found.shape[1]), dtype=found.dtype)
            out[of == number] = found
        assert out is not None
        return out


def _live(earlier: KnownChunks, entries: Entries) -> Entries:
    """Without chunks that a new one is not compared with. Repeats neither, unless the first of them may be gone: they
    would be left out by it, and none because of them."""
    keep = ~entries.repeats if earlier.is_live is None else earlier.is_live(entries.chunks)
    return Entries(
        entries.keys[keep], entries.chunks[keep], entries.repeats[keep], entries.rest[keep[: len(entries.rest)]]
    )


def _rows_among(rows: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Which rows, uint64 [n, 2], are among others: bool [n]."""
    kind = np.dtype([("first", np.uint64), ("second", np.uint64)])
    wanted, known = (np.ascontiguousarray(each).view(kind)[:, 0] for each in (rows, others))
    return np.isin(wanted, known)
