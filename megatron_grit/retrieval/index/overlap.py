"""How much of a neighbor a model has just read or is about to predict: runs of eight tokens that two texts share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

RUN = 8
"""Tokens of a run."""
_BUCKETS = 1024
"""Of the runs of a text, by their hashes."""
_NUM_BITS = np.array([number.bit_count() for number in range(1 << 16)], dtype=np.uint8)
_AT_A_TIME = 1 << 12
"""Texts or pairs that are held in memory."""
_MOST_KEPT = 1 << 18
"""Chunks of a database whose outlines are kept."""


@dataclass(frozen=True)
class Outline:
    """Which buckets the runs of texts fall into: what two texts share at most."""

    buckets: np.ndarray
    """uint64 [n, 16], a bit for each."""
    num_buckets: np.ndarray
    """int32 [n]."""
    num_runs: np.ndarray
    """int32 [n], equal ones included."""

    @staticmethod
    def of(tokens_NL: np.ndarray, lengths: np.ndarray) -> Outline:
        """Of texts, [n, L], of so many tokens each."""
        count = len(tokens_NL)
        out = np.zeros((count, _BUCKETS // 64), dtype=np.uint64)
        for start in range(0, count, _AT_A_TIME):
            part = slice(start, min(start + _AT_A_TIME, count))
            buckets, exists = _buckets(tokens_NL[part], lengths[part])
            is_there = np.zeros((len(buckets), _BUCKETS), dtype=bool)
            flat = buckets + np.arange(0, is_there.size, _BUCKETS)[:, None]
            is_there.reshape(-1)[flat if exists.all() else flat[exists]] = True
            out[part] = np.packbits(is_there, axis=1).view(np.uint64)
        num_runs = np.maximum(lengths - RUN + 1, 0).astype(np.int32)
        return Outline(out, _num_bits(out), num_runs)

    def take(self, rows: np.ndarray) -> Outline:
        """Of some of the texts."""
        return Outline(self.buckets[rows], self.num_buckets[rows], self.num_runs[rows])


def shared_at_most(texts: Outline, others: Outline) -> np.ndarray:
    """A bound of :func:`shared_runs` of pairs, float64 [n]; 1 for texts of less than a run."""
    out = np.empty(len(texts.num_runs))
    for start in range(0, len(out), _AT_A_TIME):
        part = slice(start, start + _AT_A_TIME)
        shared = _num_bits(texts.buckets[part] & others.buckets[part])
        # Each bucket that the other text has not holds a run, at least, that it has not.
        out[part] = 1 - (texts.num_buckets[part] - shared) / np.maximum(texts.num_runs[part], 1)
    return out


def shared_runs(
    texts_NL: np.ndarray, lengths: np.ndarray, others_NL: np.ndarray, other_lengths: np.ndarray
) -> np.ndarray:
    """Share of the different runs of each text that stand in another one; a text of fewer than eight tokens is one run.

    Args:
        texts_NL: int [n, L].
        lengths: int [n], tokens of each.
        others_NL: int [n, M], what each is compared with.
        other_lengths: int [n].

    Returns:
        float64 [n], from 0 to 1; 0 for a text without tokens.
    """
    out = np.zeros(len(texts_NL))
    widths = np.minimum(lengths, RUN)
    for width in np.unique(widths[widths > 0]).tolist():
        rows = np.flatnonzero(widths == width)
        for part in np.split(rows, range(_AT_A_TIME, len(rows), _AT_A_TIME)):
            own, num_own = _different(*_runs(texts_NL[part], lengths[part], width), 0)
            theirs, _ = _different(*_runs(others_NL[part], other_lengths[part], width), 1)
            both = np.sort(np.concatenate([own, theirs], axis=1), axis=1)
            out[part] = (both[:, 1:] == both[:, :-1]).sum(1) / num_own
    return out


def _num_bits(words: np.ndarray) -> np.ndarray:
    """Bits that are set in rows of uint64."""
    if hasattr(np, "bitwise_count"):  # from numpy 2 on
        return np.asarray(np.bitwise_count(words).sum(1, dtype=np.int32))
    return np.asarray(_NUM_BITS[words.view(np.uint16)].sum(1, dtype=np.int32))


def _buckets(tokens_NL: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Buckets of all runs, int64 [n, R], and where there is one."""
    count = max(tokens_NL.shape[1] - RUN + 1, 0)
    tokens, out = tokens_NL.astype(np.uint32), np.zeros((len(tokens_NL), count), dtype=np.uint32)
    for place in range(RUN):
        out *= np.uint32(0x9E3779B1)
        out += tokens[:, place : place + count]
    out ^= out >> np.uint32(15)
    out *= np.uint32(0x85EBCA6B)
    return (out >> np.uint32(22)).astype(np.int64), np.arange(count) <= (lengths - RUN)[:, None]


def _runs(tokens_NL: np.ndarray, lengths: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of all runs of ``width`` tokens, odd uint64 [n, R], and where there is one."""
    count = max(tokens_NL.shape[1] - width + 1, 0)
    tokens, out = tokens_NL.astype(np.uint64), np.zeros((len(tokens_NL), count), dtype=np.uint64)
    for place in range(width):
        out *= np.uint64(0x9E3779B97F4A7C15)
        out += tokens[:, place : place + count]
    for shift, factor in ((32, 0xD6E8FEB86659FD93), (29, 0xD6E8FEB86659FD93), (32, 1)):
        out ^= out >> np.uint64(shift)
        out *= np.uint64(factor)
    return out | np.uint64(1), np.arange(count) <= (lengths - width)[:, None]


def _different(runs: np.ndarray, exists: np.ndarray, which: int) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of runs with even numbers, which equal none, in place of those that are none or stand there twice; and how
    many are left."""
    runs = np.sort(np.where(exists, runs, 0), axis=1)
    fresh = runs > 0
    fresh[:, 1:] &= runs[:, 1:] != runs[:, :-1]
    none = (2 * np.arange(runs.shape[1]) + 2 * which * runs.shape[1]).astype(np.uint64)
    return np.where(fresh, runs, none), fresh.sum(1)


Read = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
"""Tokens of texts by number: [n, L] and how many there are of each, int [n]."""


class Outlines:
    """Outlines of the chunks of a database; those of a small one are made once, 132 bytes each.

    Args:
        read: tokens of chunks, what follows them included.
        num_chunks: of the database.
    """

    def __init__(self, read: Read, num_chunks: int) -> None:
        self.read = read
        self._known = np.zeros(num_chunks if num_chunks <= _MOST_KEPT else 0, dtype=bool)
        count = len(self._known)
        self._kept = Outline(
            np.zeros((count, _BUCKETS // 64), np.uint64), np.zeros(count, np.int32), np.zeros(count, np.int32)
        )

    def of(self, chunks: np.ndarray) -> Outline:
        """Of chunks, int64 [n], in any order."""
        if len(self._known):
            new = np.unique(chunks[~self._known[chunks]])
            if len(new):
                made, kept = Outline.of(*self.read(new)), self._kept
                kept.buckets[new], kept.num_buckets[new], kept.num_runs[new] = (
                    made.buckets, made.num_buckets, made.num_runs
                )  # fmt: skip
                self._known[new] = True
            return self._kept.take(chunks)
        different, of = np.unique(chunks, return_inverse=True)
        return Outline.of(*self.read(different)).take(of)


class Copies:
    """Leaves out neighbors that repeat what they are neighbors for.

    Args:
        chunks: of the database.
        tokens_QL: the queries with what follows them.
        lengths: int [Q], tokens of each.
        max_overlap: largest share of a neighbor's runs that may stand in its query's tokens.
        wanted: neighbors of a query.
    """

    def __init__(
        self, chunks: Outlines, tokens_QL: np.ndarray, lengths: np.ndarray, max_overlap: float, wanted: int
    ) -> None:
        self._chunks, self._tokens, self._lengths = chunks, tokens_QL, lengths
        self._max, self._wanted = max_overlap, wanted
        self._own = Outline.of(tokens_QL, lengths)
        self._dropped = np.zeros(len(lengths), dtype=np.int64)

    @property
    def num_dropped(self) -> int:
        """Neighbors that were left out before enough were found."""
        return int(self._dropped.sum())

    def drop(self, queries: np.ndarray, ids_RK: np.ndarray, keep_RK: np.ndarray) -> None:
        """Clear ``keep`` where a chunk repeats its query. No more chunks are read than it takes to find enough.

        Args:
            queries: numbers of the queries, [R].
            ids_RK: chunks, the nearest first.
            keep_RK: bool, those that are looked at.
        """
        before, looked_at = keep_RK.copy(), np.zeros(len(queries), dtype=np.int32)
        pending, width, last = np.arange(len(queries)), 2 * self._wanted, keep_RK.shape[1]
        while len(pending):
            width = min(width, last)
            rank = np.cumsum(before[pending, :width], axis=1, dtype=np.int32)
            done = looked_at[pending]
            until = np.minimum(rank[:, -1], done + self._wanted)
            is_next = before[pending, :width] & (rank > done[:, None]) & (rank <= until[:, None])
            rows, places = np.nonzero(is_next)
            rows = pending[rows]
            copies = self._are_copies(queries[rows], ids_RK[rows, places])
            keep_RK[rows[copies], places[copies]] = False
            looked_at[pending] = until
            num_left = (keep_RK[pending, :width] & (rank <= until[:, None])).sum(1)
            is_last = (rank[:, -1] <= until) & (width == last)
            pending, width = pending[(num_left < self._wanted) & ~is_last], 2 * width
        self._dropped[queries] = 0  # of a query that is searched again all is looked at again
        some = np.flatnonzero((before != keep_RK).any(axis=1))
        enough = np.cumsum(keep_RK[some], axis=1) >= self._wanted
        self._dropped[queries[some]] = (before[some] & ~keep_RK[some] & ~enough).sum(1)

    def _are_copies(self, queries: np.ndarray, chunks: np.ndarray) -> np.ndarray:
        out = np.zeros(len(chunks), dtype=bool)
        bounds = shared_at_most(self._chunks.of(chunks), self._own.take(queries))
        doubtful = np.flatnonzero(bounds > self._max)
        for part in np.split(doubtful, range(_AT_A_TIME, len(doubtful), _AT_A_TIME)):
            tokens, lengths = self._chunks.read(chunks[part])
            shares = shared_runs(tokens, lengths, self._tokens[queries[part]], self._lengths[queries[part]])
            out[part] = shares > self._max
        return out
