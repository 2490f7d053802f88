"""How thoroughly an index is searched, and what share of the exact neighbors that finds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from megatron_grit.config.retro_db import RetroDbConfig
from megatron_grit.retrieval.index_search import ShardedIndex

RECALL_AT = 10
_CHOOSING = 0.25
"""Share of the queries that choose the settings; the others measure them."""


@dataclass(kw_only=True)
class SearchSettings:
    """How an index is searched, and what that finds, as ``search.json`` beside it says."""

    nprobe: int | None
    ef_search: int | None
    recall: float
    """Share of the exact nearest neighbors that a search finds, over queries that chose nothing."""
    recall_low: float
    recall_high: float
    """95% confidence interval, by bootstrap over queries."""
    recall_at: int
    num_queries: int
    queries: str = ""
    """What they were."""
    query_instruction: str = ""
    """With which they were embedded."""
    signature: str = ""
    """Of the index and of the settings that were given."""


def without_own(ids_QK: np.ndarray, own_Q: np.ndarray, k: int) -> np.ndarray:
    """The first ``k`` of each row that are not its own id; -1 where there are fewer."""
    keep = (ids_QK != own_Q[:, None]) & (ids_QK >= 0)
    order = np.argsort(~keep, axis=1, kind="stable")[:, :k]
    found = np.where(np.take_along_axis(keep, order, 1), np.take_along_axis(ids_QK, order, 1), -1)
    return np.pad(found, ((0, 0), (0, k - found.shape[1])), constant_values=-1)


def recall_of(found_QK: np.ndarray, exact_QK: np.ndarray) -> np.ndarray:
    """Share of each query's exact neighbors that were found, float64 [Q]; 1 where it has none."""
    exists = exact_QK >= 0
    hits = ((exact_QK[:, :, None] == found_QK[:, None, :]) & exists[:, :, None]).any(2).sum(1)
    return np.where(exists.any(1), hits / np.maximum(exists.sum(1), 1), 1.0)


def choose_search(
    index: ShardedIndex, config: RetroDbConfig, queries: np.ndarray, query_ids: np.ndarray, exact: np.ndarray
) -> SearchSettings:
    """The least thorough search that reaches the wanted recall on some of the queries, measured on the others.

    Args:
        index: the index.
        config: of the database: recall, nprobe, ef_search and seed.
        queries: float32 [Q, D], at least one.
        query_ids: their own ids, which do not count as found.
        exact: int64 [Q, RECALL_AT], their exact nearest neighbors; -1 where there are fewer.
    """

    def recalls(part: slice, nprobe: int | None, ef_search: int | None) -> np.ndarray:
        index.set_search(nprobe, ef_search)
        _, ids = index.search(queries[part], RECALL_AT + 1)
        return recall_of(without_own(ids, query_ids[part], RECALL_AT), exact[part])

    num_choosing = max(1, int(_CHOOSING * len(queries)))
    # A single query does both.
    choosing, measuring = slice(0, num_choosing), slice(num_choosing if len(queries) > 1 else 0, len(queries))

    def reaches(nprobe: int) -> bool:
        values = recalls(choosing, nprobe, config.ef_search or _ef_search(nprobe))
        # Less a standard error: of a search that was chosen for its luck with these queries others find less.
        return bool(values.mean() - values.std() / np.sqrt(len(values)) >= config.recall)

    nprobe, ef_search = config.nprobe, config.ef_search
    if nprobe is None and index.num_lists > 1:
        nprobe = fewest(reaches, index.num_lists)
    if ef_search is None and "HNSW" in index.factory:
        ef_search = _ef_search(nprobe)
    values = recalls(measuring, nprobe, ef_search)
    rng = np.random.default_rng(config.seed)
    means = [values[rng.integers(0, len(values), len(values))].mean() for _ in range(1000)]
    low, high = np.quantile(means, [0.025, 0.975])
    return SearchSettings(
        nprobe=nprobe,
        ef_search=ef_search,
        recall=float(values.mean()),
        recall_low=float(low),
        recall_high=float(high),
        recall_at=RECALL_AT,
        num_queries=len(values),
    )


def fewest(reaches: Callable[[int], bool], most: int) -> int:
    """The smallest number of 1 to ``most`` that suffices, where larger ones do as well; ``most`` if none does."""
    low, high = 0, 1
    while high < most and not reaches(high):
        low, high = high, min(2 * high, most)
    while high - low > 1:
        middle = (low + high) // 2
        if reaches(middle):
            high = middle
        else:
            low = middle
    return high


def _ef_search(nprobe: int | None) -> int:
    return max(2 * (nprobe or 32), 32)
