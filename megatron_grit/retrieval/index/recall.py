"""How thoroughly an index is searched, and what share of the exact neighbors that finds."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from megatron_grit.config.database.schema import RetroDbConfig
from megatron_grit.errors import DataError
from megatron_grit.retrieval.index.search import Found, ShardedIndex
from megatron_grit.retrieval.shares import interval_of_few
from megatron_grit.store.logs import get_logger
from megatron_grit.store.progress import still_at_work
from megatron_grit.store.sealed import read_sealed

log = get_logger(__name__)

RECALL_AT = 10
Population = Literal["chunks", "questions"]
"""Kinds of query. Text that is looked up by text finds more of its nearest neighbors than people's questions do."""
QUESTIONS_FILE = "search_questions.json"
"""Beside ``search.json``: how the index is searched for questions, where that was measured."""
_TOLERANCE = 0.005
"""Recall below the wanted one that is not worth a warning."""
_CHOOSING = 0.25
"""Share of the queries that choose the settings; the others measure them."""
_WITHIN = 0.01
"""Recall that is given up for a faster search where the wanted one is out of reach."""


@dataclass(kw_only=True)
class SearchSettings:
    """How an index is searched for queries of one population, and what that finds: ``search.json`` beside the index for
    chunks, and :data:`QUESTIONS_FILE` for questions."""

    nprobe: int | None
    ef_search: int | None
    recall: float
    """Share of the exact nearest neighbors that a search finds, over queries that chose nothing."""
    recall_low: float
    recall_high: float
    """95% confidence interval, by bootstrap over queries, or Wilson's where they are few."""
    recall_at: int
    num_queries: int
    population: Population = "chunks"
    """Of which kind the queries were, for which alone the recall is a promise."""
    queries: str = ""
    """What they were."""
    queries_sha256: str = ""
    """Of the content of their file; empty for chunks."""
    version: int | None = None
    """Of the database in which they were searched. None: the one that was being built."""
    query_instruction: str = ""
    """With which they were embedded."""
    signature: str = ""
    """Of the queries, the index and of the settings that were given."""
    most_recall: float | None = None
    """Where the wanted recall is out of reach: that of the most thorough search, on the queries that chose nprobe."""
    most_nprobe: int | None = None
    """Lists that it visits."""

    def __post_init__(self) -> None:
        for name in ("nprobe", "ef_search", "recall_at", "num_queries", "most_nprobe", "version"):
            _check_number(name, getattr(self, name), int, optional=name not in ("recall_at", "num_queries"))
        for name in ("recall", "recall_low", "recall_high", "most_recall"):
            _check_number(name, getattr(self, name), float, optional=name == "most_recall")
        if self.population not in get_args(Population):
            raise ValueError(f"population is {self.population!r}")


def _check_number(name: str, value: object, kind: type, *, optional: bool) -> None:
    if optional and value is None:
        return
    kinds = (int, float) if kind is float else (int,)
    if isinstance(value, bool) or not isinstance(value, kinds) or not math.isfinite(value):
        raise ValueError(f"{name} is {value!r}")


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
    index: ShardedIndex,
    config: RetroDbConfig,
    queries: np.ndarray,
    query_ids: np.ndarray,
    exact: np.ndarray,
    search: Callable[[np.ndarray, int], Found] | None = None,
) -> SearchSettings:
    """The least thorough search that reaches the wanted recall on some of the queries, measured on the others. Where
    none reaches it, as the codes are too coarse, the least thorough whose recall is within :data:`_WITHIN` of the best.

    Args:
        index: the index.
        config: of the database: recall, nprobe, ef_search and seed.
        queries: float32 [Q, D], at least one.
        query_ids: their own ids, which do not count as found.
        exact: int64 [Q, RECALL_AT], their exact nearest neighbors; -1 where there are fewer.
        search: of the index, as it will be searched: for queries and how many are wanted. None: of all that it holds.
    """
    search = search or index.search

    def recalls(part: slice, nprobe: int | None, ef_search: int | None) -> np.ndarray:
        index.set_search(nprobe, ef_search)
        _, ids = search(queries[part], RECALL_AT + 1)
        return recall_of(without_own(ids, query_ids[part], RECALL_AT), exact[part])

    num_choosing = max(1, int(_CHOOSING * len(queries)))
    # A single query does both.
    choosing, measuring = slice(0, num_choosing), slice(num_choosing if len(queries) > 1 else 0, len(queries))

    nprobe, ef_search, most = config.nprobe, config.ef_search, None
    with still_at_work(f"choosing how index {index.factory} is searched"):
        if nprobe is None and index.num_lists > 1:
            nprobe, most = choose_nprobe(
                lambda nprobe: recalls(choosing, nprobe, config.ef_search or _ef_search(nprobe)),
                config.recall,
                index.num_lists,
            )
        if ef_search is None and index.is_graph:
            ef_search = choose_candidates(lambda number: recalls(choosing, None, number), config.recall)
        elif ef_search is None and "HNSW" in index.factory:
            ef_search = _ef_search(nprobe)
        values = recalls(measuring, nprobe, ef_search)
    rng = np.random.default_rng(config.seed)
    means = [values[rng.integers(0, len(values), len(values))].mean() for _ in range(1000)]
    low, high = interval_of_few(values) or np.quantile(means, [0.025, 0.975])
    return SearchSettings(
        nprobe=nprobe,
        ef_search=ef_search,
        recall=float(values.mean()),
        recall_low=float(low),
        recall_high=float(high),
        recall_at=RECALL_AT,
        num_queries=len(values),
        most_nprobe=most[0] if most else None,
        most_recall=most[1] if most else None,
    )


def choose_candidates(recalls: Callable[[int], np.ndarray], wanted: float) -> int:
    """How many candidates the search of a graph keeps: the first of 16, 32, ... 4,096 whose recall is the wanted one,
    less a standard error; where none is, the first within :data:`_WITHIN` of the best.

    Args:
        recalls: each query's recall with so many, float64 [Q].
        wanted: mean of them.
    """
    means = {}
    for number in (2**power for power in range(4, 13)):
        values = recalls(number)
        means[number] = float(values.mean())
        if means[number] - float(values.std()) / math.sqrt(len(values)) >= wanted:
            return number
    return next(number for number, mean in means.items() if mean >= max(means.values()) - _WITHIN)


def choose_nprobe(
    recalls: Callable[[int], np.ndarray], wanted: float, num_lists: int
) -> tuple[int, tuple[int, float] | None]:
    """How many lists to visit.

    Recall grows with the number of lists, ever more slowly for each doubling: as a function of its logarithm it is the
    share of neighbors that lie in so many nearest lists, and such shares grow by a factor that falls. So no more lists
    are tried where the last factors, kept up to all lists, would not lead to the wanted recall, and the last doubling
    brought next to nothing.

    Args:
        recalls: each query's recall with so many lists, float64 [Q].
        wanted: mean of them.
        num_lists: all.

    Returns:
        The number; and, where the wanted recall is out of reach, the largest number that was tried and its mean recall.
    """
    tried: dict[int, np.ndarray] = {}

    def values(nprobe: int) -> np.ndarray:
        if nprobe not in tried:
            tried[nprobe] = recalls(nprobe)
        return tried[nprobe]

    def mean(nprobe: int) -> float:
        return float(values(nprobe).mean())

    def reaches(nprobe: int) -> bool:
        # Less a standard error: of a search that was chosen for its luck with these queries others find less.
        return mean(nprobe) - float(values(nprobe).std()) / math.sqrt(len(values(nprobe))) >= wanted

    def is_hopeless(nprobe: int) -> bool:
        if nprobe < 4 or not mean(nprobe // 4) or mean(nprobe) - mean(nprobe // 2) > _WITHIN / 4:
            return False
        factor = max(mean(nprobe) / mean(nprobe // 2), mean(nprobe // 2) / mean(nprobe // 4))
        return mean(nprobe) * factor ** math.log2(num_lists / nprobe) < wanted

    most = 1
    while most < num_lists and not reaches(most) and not is_hopeless(most):
        most = min(2 * most, num_lists)
    if reaches(most):
        return fewest(reaches, most), None
    best = mean(most)
    least = max(wanted, best - _WITHIN) if best >= wanted else best - _WITHIN
    nprobe = fewest(lambda number: mean(number) >= least, most)
    if best >= wanted:
        return nprobe, None
    log.info(
        f"recall {wanted} is out of reach: {most:,} of {num_lists:,} lists give {best:.3f}, {nprobe:,} lists "
        f"{mean(nprobe):.3f} ({len(values(nprobe)):,} queries); nprobe is {nprobe:,}"
    )
    return nprobe, (most, best)


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


def report_recall(config: RetroDbConfig, index: ShardedIndex, settings: SearchSettings) -> None:
    """Log what was measured, and what can be done where it is not the wanted recall."""
    log.info(
        f"recall@{settings.recall_at} against exact search for {settings.population}: {settings.recall:.3f} "
        f"({settings.recall_low:.3f} to {settings.recall_high:.3f}, {settings.num_queries:,} {settings.queries}) with "
        f"nprobe {settings.nprobe}, ef_search {settings.ef_search}"
    )
    if config.nprobe is not None or settings.recall >= config.recall - _TOLERANCE:
        return
    found = (
        f"index {index.factory} finds {settings.recall:.3f} of the nearest neighbors of {settings.population}, not the "
        f"wanted recall {config.recall}"
    )
    if settings.nprobe is not None and settings.nprobe < index.num_lists and settings.most_recall is None:
        log.warning(f"{found}, which the queries that chose nprobe {settings.nprobe} had; set nprobe higher")
        return
    if settings.most_nprobe in (None, index.num_lists):
        found += ", even where all of it is searched"
    else:
        found += f", even with nprobe {settings.most_nprobe:,}"
    if settings.most_recall is not None:
        found += f" ({settings.most_recall:.3f})"
    remedy = "raise index_memory_gb" if config.index == "auto" else "give an index with longer codes, or auto"
    log.warning(f"{found}: its codes are too coarse; {remedy} and build it again with --overwrite index-train")


def read_search(path: Path) -> SearchSettings:
    """The ``search.json`` of an index, or its :data:`QUESTIONS_FILE`. In those of earlier releases the words tell texts
    from chunks.

    Raises:
        DataError: it is missing or cannot be read.
    """
    task = "recall" if path.name == QUESTIONS_FILE else "index-add"
    if not path.is_file():
        raise DataError(f"is missing; run --tasks {task}", path=path)
    try:
        values = read_sealed(path)
        if "population" not in values and str(values.get("queries", "")).startswith("texts of "):
            values["population"] = "questions"
        return SearchSettings(**values)
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"cannot be read ({error}); delete it and run --tasks {task}", path=path) from None
