"""Searching an index of several files: in one process, or in several of which each holds a share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_grit.data.chunks.neighbor_table import take_first
from megatron_grit.errors import DataError
from megatron_grit.retrieval.index.factory import lists_of
from megatron_grit.retrieval.index.faiss_index import Gpus, VectorIndex
from megatron_grit.retrieval.index.id_ranges import NO_RANGES
from megatron_grit.retrieval.index.manifest import read_manifest
from megatron_grit.retrieval.work import Worker
from megatron_grit.store.logs import get_logger

log = get_logger(__name__)

MOST_TIMES_MORE = 16
"""Where filters leave fewer neighbors than are kept, so many times more are searched at most."""
Found = tuple[np.ndarray, np.ndarray]
"""Scores, float32 [Q, k], and ids, int64 [Q, k]: the best first, -1 where there are fewer."""


@dataclass(frozen=True)
class Further:
    """What a search does beyond the usual one."""

    without_QR2: np.ndarray
    """int64 [Q, R, 2]: ranges of ids that are passed over for each query, beside those of removed documents."""
    times: int = 1
    """So many times more lists are visited."""


class _Shards:
    """The files of an index that this process holds.

    Attributes:
        removed: int64 [R, 2], ranges of ids of removed documents, which a :class:`Further` search passes over.
        nprobe: lists that are visited.
    """

    shards: list[VectorIndex]
    metric: str
    removed: np.ndarray = NO_RANGES
    nprobe = 1

    def to_gpus(self, gpus: Gpus) -> None:
        """As :meth:`VectorIndex.to_gpus`, of what this process holds."""
        for shard in self.shards:
            shard.to_gpus(gpus)

    def set_search(self, nprobe: int | None, ef_search: int | None) -> None:
        """As :meth:`VectorIndex.set_search`."""
        self.nprobe = nprobe or self.nprobe
        for shard in self.shards:
            shard.set_search(nprobe, ef_search)

    def _search_here(self, queries_QD: np.ndarray, k: int, further: Further | None) -> Found:
        if not self.shards or not len(queries_QD):
            return _nothing(len(queries_QD), k, self.metric)
        if further is None:
            return merge_nearest([shard.search(queries_QD, k) for shard in self.shards], k, self.metric)
        scores, ids = _nothing(len(queries_QD), k, self.metric)
        # A search has one selector: queries that pass over the same ids are searched together.
        flat = further.without_QR2.reshape(len(queries_QD), -1)
        different, of = np.unique(flat, axis=0, return_inverse=True)
        for number, ranges in enumerate(different):
            rows = np.flatnonzero(of.reshape(-1) == number)
            ranges = np.concatenate([ranges.reshape(-1, 2), self.removed])
            ranges = ranges[ranges[:, 0] < ranges[:, 1]]
            parts = [shard.search(queries_QD[rows], k, ranges, further.times) for shard in self.shards]
            scores[rows], ids[rows] = merge_nearest(parts, k, self.metric)
        return scores, ids


class ShardedIndex(_Shards):
    """Several indexes that share out the ids, searched one after the other; their best are merged.

    Of equal scores the smaller id comes first. Which of those that share the last place are found may differ from one
    number of shards to another.

    Args:
        shards: at least one, of one factory string.
    """

    def __init__(self, shards: list[VectorIndex]) -> None:
        self.shards = shards
        self.factory, self.metric, self.num_lists = shards[0].factory, shards[0].metric, shards[0].num_lists
        self.dim, self.is_graph = shards[0].dim, shards[0].is_graph

    @staticmethod
    def load(paths: Sequence[Path], **options: Any) -> ShardedIndex:
        """Open shards; options as of :meth:`VectorIndex.load`."""
        return ShardedIndex([VectorIndex.load(path, **options) for path in paths])

    def __len__(self) -> int:
        return sum(len(shard) for shard in self.shards)

    def search(self, vectors_ND: np.ndarray, k: int, further: Further | None = None) -> Found:
        """As :meth:`VectorIndex.search`, with ranges for each query."""
        return self._search_here(vectors_ND, k, further)

    def serving(self) -> AbstractContextManager[None]:
        """As :meth:`SpreadIndex.serving`; nobody waits for this process."""
        return nullcontext()


class SpreadIndex(_Shards):
    """An index of which each process holds some of the files. A search is made by all processes together: each sends
    its queries to all, searches all queries in what it holds, and merges what the others found for its own.

    So all processes search equally often, those included that have nothing to search: :meth:`serving`. Processes that
    hold one embedder together make the same searches; the queries of the one that leads them are asked, and all of them
    get what is found.

    What is found is what :class:`ShardedIndex` finds in the same files, bit for bit.

    Args:
        paths: the files of the index, at least one, the same on all processes.
        worker: this process.
        embedder: as of :meth:`VectorIndex.load`.

    Attributes:
        shards: what this process holds.
    """

    def __init__(self, paths: Sequence[Path], worker: Worker, embedder: str | None = None) -> None:
        self._worker = worker
        manifests = [read_manifest(path) for path in paths]
        self._length = sum(manifest.num_vectors for manifest in manifests)
        self.factory, self.metric, self.dim = manifests[0].factory, manifests[0].metric, manifests[0].dim
        self.num_lists = lists_of(self.factory) or 1
        mine = dealt_out([manifest.bytes for manifest in manifests], worker.world_size)[worker.rank]
        if worker.is_first and len(paths) < worker.world_size:
            log.warning(
                f"the index has {len(paths)} files for {worker.world_size} processes: "
                f"{worker.world_size - len(paths)} of them hold none; raise num_shards to shard it further"
            )
        self.shards = [VectorIndex.load(paths[number], embedder=embedder) for number in mine]
        groups = worker.gather([worker.group, worker.leads])
        leader = {group: rank for rank, (group, leads) in enumerate(groups) if leads}
        self._asks_for = [leader[group] for group, _ in groups]
        """For each process the one whose queries it asks."""

    def __len__(self) -> int:
        return self._length

    def search(self, vectors_ND: np.ndarray, k: int, further: Further | None = None) -> Found:
        """As :meth:`ShardedIndex.search`. All processes call it, or are :meth:`serving`; what they give may differ."""
        if vectors_ND.shape[1] != self.dim:
            raise DataError(f"queries have {vectors_ND.shape[1]} channels, the index {self.dim}")
        found, _ = self._search_together(vectors_ND, k, further, done=False)
        return found

    @contextmanager
    def serving(self) -> Iterator[None]:
        """While this process searches. At the end it answers the others until they have come there as well."""
        yield
        nothing, all_done = np.empty((0, self.dim), np.float32), False
        while not all_done:
            _, all_done = self._search_together(nothing, 1, None, done=True)

    def _search_together(
        self, vectors_ND: np.ndarray, k: int, further: Further | None, *, done: bool
    ) -> tuple[Found, bool]:
        """One search of all processes; and whether all of them are done."""
        worker = self._worker
        asked = np.ascontiguousarray(vectors_ND if worker.leads else vectors_ND[:0], dtype=np.float32)
        ranges = np.empty((0, 0, 2), np.int64) if further is None else further.without_QR2[: len(asked)]
        head = [len(asked), k, done, 0 if further is None else further.times, ranges.shape[1]]
        heads = np.concatenate(worker.gather_arrays(np.array([head])))
        if not heads[:, 0].any():
            return _nothing(len(vectors_ND), k, self.metric), bool(heads[:, 2].all())
        queries = worker.gather_arrays(asked)
        passed = [ranges] * worker.world_size
        if heads[:, 4].any():
            passed = worker.gather_arrays(np.ascontiguousarray(ranges, dtype=np.int64).reshape(-1))
        # Each process's queries by themselves, as it would search them alone: in other company the last bits differ.
        answers = []
        for part, own, (size, most, _, times, number) in zip(queries, passed, heads.tolist(), strict=True):
            theirs = Further(own.reshape(size, number, 2), times) if times else None
            answers.append(self._search_here(part, most, theirs))
        scores, ids = (
            worker.exchange([answers[leader][which].ravel() for leader in self._asks_for]) for which in range(2)
        )
        shape = len(vectors_ND), k
        parts = [(s.reshape(shape), i.reshape(shape)) for s, i in zip(scores, ids, strict=True)]
        return merge_nearest(parts, k, self.metric), False


SearchableIndex = ShardedIndex | SpreadIndex


def find_allowed(
    index: SearchableIndex,
    vectors_QD: np.ndarray,
    num_query: int,
    num_save: int,
    allowed: Callable[[np.ndarray, np.ndarray], np.ndarray],
    passed_over: Callable[[np.ndarray], np.ndarray] | None = None,
    *,
    more_lists: bool = True,
) -> Found:
    """The nearest chunks that a filter lets through.

    Where it leaves too few, the search is made again without the documents that the filter leaves out whole, however
    many chunks they have. Where that still leaves too few, more lists are visited if those that were hold no more, else
    more candidates are searched, up to :data:`MOST_TIMES_MORE` times as many.

    Args:
        index: what is searched.
        vectors_QD: queries.
        num_query: candidates of each query at first.
        num_save: chunks that are wanted.
        allowed: given numbers of queries, [R], and candidates, int64 [R, K], -1 for none: bool [R, K].
        passed_over: given numbers of queries, [R]: ranges of ids that ``allowed`` lets none of through, int64
            [R, n, 2]; those of removed documents the index knows. None: the filter is of chunks alone.
        more_lists: whether more lists are visited where those that were hold too few. False: these may be few, as in
            what came to a database, and what is found is merged with the rest.

    Returns:
        Scores and ids, [Q, num_save], nearest first; -1 where there are fewer.
    """
    out_scores, out = _nothing(len(vectors_QD), num_save, index.metric)
    most = max(1, min(len(index), MOST_TIMES_MORE * num_query))
    most_times = 1 if index.num_lists == 1 or not more_lists else -(-index.num_lists // index.nprobe)
    rows = np.arange(len(vectors_QD))
    ks, times = np.full(len(rows), min(num_query, most)), np.ones(len(rows), dtype=np.int64)
    is_first = True
    while len(rows):
        short = []
        for part in _alike(rows, ks, times, len(vectors_QD) * num_query):
            further = None
            if passed_over is not None and not is_first:
                further = Further(passed_over(part), int(times[part[0]]))
            elif times[part[0]] > 1:
                further = Further(np.empty((len(part), 0, 2), dtype=np.int64), int(times[part[0]]))
            scores, ids = index.search(vectors_QD[part], int(ks[part[0]]), further)
            keep = (ids >= 0) & allowed(part, ids)
            out[part] = take_first(ids, keep, num_save)
            out_scores[part] = take_first(scores, keep, num_save, _worst(index.metric))
            is_short, is_full = keep.sum(1) < num_save, ids[:, -1] >= 0
            if passed_over is None or not is_first:
                # Lists that are too small call for more lists, else more candidates are wanted.
                deeper, wider = part[is_short & is_full], part[is_short & ~is_full]
                deeper, wider = deeper[ks[deeper] < most], wider[times[wider] < most_times]
                ks[deeper] = np.minimum(2 * ks[deeper], most)
                times[wider] = np.minimum(2 * times[wider], most_times)
                short += [deeper, wider]
            elif more_lists:
                short.append(part[is_short])
            else:
                short.append(part[is_short & is_full & (ks[part] < len(index))])
        rows, is_first = np.sort(np.concatenate(short)), False
    return out_scores, out


def _alike(rows: np.ndarray, ks: np.ndarray, times: np.ndarray, most_candidates: int) -> Iterator[np.ndarray]:
    """Rows that are searched alike, in runs that have no more candidates than the first search."""
    for k, number in sorted(set(zip(ks[rows].tolist(), times[rows].tolist(), strict=True))):
        alike = rows[(ks[rows] == k) & (times[rows] == number)]
        at_a_time = max(1, most_candidates // k)
        yield from (alike[start : start + at_a_time] for start in range(0, len(alike), at_a_time))


def dealt_out(sizes: Sequence[int], count: int) -> list[list[int]]:
    """Numbers of things, ascending, in ``count`` shares of about the same size: the largest first, each to the share
    that has least.

    Args:
        sizes: of the things.
        count: shares.
    """
    shares: list[list[int]] = [[] for _ in range(count)]
    loads = [0] * count
    for number in sorted(range(len(sizes)), key=lambda number: (-sizes[number], number)):
        # Of shares that have as much, the one of fewer things: files may be empty.
        least = min(range(count), key=lambda share: (loads[share], len(shares[share]), share))
        shares[least].append(number)
        loads[least] += sizes[number]
    return [sorted(share) for share in shares]


def _nothing(num_queries: int, k: int, metric: str) -> Found:
    return np.full((num_queries, k), _worst(metric), np.float32), np.full((num_queries, k), -1, np.int64)


def merge_in_turn(parts: Iterable[Found], k: int, metric: str) -> Found:
    """As :func:`merge_nearest` of parts that come one after the other, of which two are held at a time."""
    best: Found | None = None
    for part in parts:
        best = merge_nearest([part] if best is None else [best, part], k, metric)
    assert best is not None, "nothing was searched"
    return best


def merge_nearest(parts: Sequence[Found], k: int, metric: str) -> Found:
    """The k best of several searches of the same queries: scores and ids, [Q, k], -1 where there are fewer. Of equal
    scores the smaller id comes first, so that the order of the parts does not matter.

    Args:
        parts: at least one; a search of any number of neighbors, the best first.
        k: neighbors.
        metric: l2, of which the smallest are best, or inner_product.
    """
    scores, ids = parts[0]
    if len(parts) > 1:  # most indexes are one file: nothing is copied then
        scores = np.concatenate([part[0] for part in parts], axis=1)
        ids = np.concatenate([part[1] for part in parts], axis=1)
    if (ids < 0).any():
        scores = np.where(ids < 0, _worst(metric), scores)
    keys = scores if metric == "l2" else -scores
    if keys.shape[1] > k:
        order = _order_of_best(keys, ids, k)
        scores, ids = np.take_along_axis(scores, order, 1), np.take_along_axis(ids, order, 1)
    else:
        # One search's rows are in order but where scores are equal, and those are few.
        rows = np.flatnonzero(~(keys[:, 1:] > keys[:, :-1]).all(axis=1))
        if len(rows):
            order = np.lexsort((ids[rows], keys[rows]), axis=1)
            scores, ids = scores.copy(), ids.copy()
            for values in (scores, ids):
                values[rows] = np.take_along_axis(values[rows], order, 1)
    missing = k - keys.shape[1]
    if missing <= 0:
        return scores, ids
    return (
        np.pad(scores, ((0, 0), (0, missing)), constant_values=_worst(metric)),
        np.pad(ids, ((0, 0), (0, missing)), constant_values=-1),
    )


def _order_of_best(keys: np.ndarray, ids: np.ndarray, k: int) -> np.ndarray:
    """Places of the k smallest keys of each row, [Q, k], in order, of equal keys the smaller id first."""
    chosen = np.argpartition(keys, k - 1, axis=1)[:, :k]
    best = np.take_along_axis(keys, chosen, 1)
    order = np.take_along_axis(chosen, np.lexsort((np.take_along_axis(ids, chosen, 1), best), axis=1), 1)
    # Where several share the last place, the partition took any of them.
    shared = (keys <= best.max(axis=1, keepdims=True)).sum(axis=1) > k
    order[shared] = np.lexsort((ids[shared], keys[shared]), axis=1)[:, :k]
    return order


def _worst(metric: str) -> float:
    return np.inf if metric == "l2" else -np.inf
