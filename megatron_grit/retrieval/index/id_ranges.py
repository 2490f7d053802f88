"""Ranges of ids that a search passes over."""

from __future__ import annotations

from typing import Any

import numpy as np

NO_RANGES = np.empty((0, 2), dtype=np.int64)
_MOST_RANGES = 8
"""Ranges that a search asks of each vector one after the other; more are put into a hash table of their ids."""


def count(ranges: np.ndarray) -> int:
    """Ids in ranges, int64 [R, 2]: the first and one after the last of each."""
    return int((ranges[:, 1] - ranges[:, 0]).sum())


def members(ranges: np.ndarray) -> np.ndarray:
    """The ids of ranges, int64, ascending, each once."""
    sizes = ranges[:, 1] - ranges[:, 0]
    before = np.cumsum(sizes) - sizes
    return np.unique(np.arange(int(sizes.sum())) + np.repeat(ranges[:, 0] - before, sizes))


def outside(faiss: Any, ranges: np.ndarray) -> Any:
    """faiss's selector of all ids but those of ranges."""
    if len(ranges) > _MOST_RANGES:
        return faiss.IDSelectorNot(faiss.IDSelectorBatch(members(ranges)))
    selector = faiss.IDSelectorRange(0, 0)
    for first, stop in ranges.tolist():
        selector = faiss.IDSelectorOr(selector, faiss.IDSelectorRange(first, stop))
    return faiss.IDSelectorNot(selector)


def drop_members(scores: np.ndarray, ids: np.ndarray, ranges: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The first ``k`` of each row, [Q, K], that are in none of the ranges; -1 where there are fewer."""
    known = np.append(members(ranges), np.iinfo(np.int64).max)
    keep = (known[np.searchsorted(known, ids)] != ids) & (ids >= 0)
    order = np.argsort(~keep, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, order, 1), np.take_along_axis(np.where(keep, ids, -1), order, 1)
