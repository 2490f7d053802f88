"""Which records a step trains on: pure functions of (seed, step, slot).

Nothing here keeps a position. The same step gives the same records for any data parallel size, number of workers or
restart, and a run is resumed by asking for the next step.

Random numbers are the raw output of Philox, keyed through SeedSequence: NumPy keeps both streams fixed between
versions, which it does not promise for shuffles. A permutation is the order of such numbers.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from enum import IntEnum

import numpy as np

from megatron_grit.errors import ConfigError


class _Stream(IntEnum):
    """Keeps the draws of different decisions apart. Part of the data order: never renumber."""

    EMBEDDING_SCHEDULE = 0
    EMBEDDING_RECORDS = 1
    GENERATIVE_RECORDS = 2
    PASSAGES = 3


def _draw(count: int, seed: int, stream: _Stream, *key: int) -> np.ndarray:
    """uint64 [count], a function of the arguments alone."""
    sequence = np.random.SeedSequence(entropy=seed, spawn_key=(int(stream), *key))
    return np.random.Philox(sequence).random_raw(count)


def _permutation(count: int, seed: int, stream: _Stream, *key: int) -> np.ndarray:
    """int64 [count]: a permutation, a function of the arguments alone."""
    return np.argsort(_draw(count, seed, stream, *key), kind="stable")


class EmbeddingSampler:
    """Batches of queries, each from one source.

    A round visits every source as often as it has whole batches, in an order drawn for that round. So sources come up
    in proportion to their size, and a round is one epoch of each of them. An epoch is a permutation of its own; the
    last ``size % batch_size`` records of it are left out, hence no record comes twice in a batch.

    Args:
        source_sizes: records of each source.
        batch_size: queries of a global batch.
        seed: seed of the data order.
        source_names: for messages.

    Raises:
        ConfigError: a source that is smaller than a batch.
    """

    def __init__(
        self, source_sizes: Sequence[int], batch_size: int, seed: int, source_names: Sequence[str] | None = None
    ) -> None:
        names = source_names or [str(index) for index in range(len(source_sizes))]
        for name, size in zip(names, source_sizes, strict=True):
            if size < batch_size:
                raise ConfigError(
                    f"source {name} has {size} records, fewer than training.embedding_batch_size {batch_size}: an "
                    "embedding batch comes from one source"
                )
        self._sizes = list(source_sizes)
        self._batch_size = batch_size
        self._seed = seed
        self._batches = np.array([size // batch_size for size in source_sizes], dtype=np.int64)
        self._steps_per_round = int(self._batches.sum())
        self._round = functools.lru_cache(maxsize=2)(self._draw_round)
        self._epoch = functools.lru_cache(maxsize=len(self._sizes) + 1)(self._draw_epoch)

    @property
    def steps_per_round(self) -> int:
        """Steps in which every source is gone through once."""
        return self._steps_per_round

    def batch(self, step: int) -> tuple[int, np.ndarray]:
        """Source of a step, and the records it takes of it: int64 [batch_size]."""
        number, position = divmod(step, self._steps_per_round)
        sources, visits = self._round(number)
        source, visit = int(sources[position]), int(visits[position])
        order = self._epoch(source, number)
        return source, order[visit * self._batch_size : (visit + 1) * self._batch_size]

    def _draw_round(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Source of each step of a round, and how many steps of the round went to that source before."""
        sources = np.repeat(np.arange(len(self._sizes)), self._batches)
        order = _permutation(self._steps_per_round, self._seed, _Stream.EMBEDDING_SCHEDULE, number)
        sources = sources[order]
        visits = np.empty_like(sources)
        for source, count in enumerate(self._batches):
            visits[sources == source] = np.arange(count)
        return sources, visits

    def _draw_epoch(self, source: int, epoch: int) -> np.ndarray:
        return _permutation(self._sizes[source], self._seed, _Stream.EMBEDDING_RECORDS, source, epoch)


class GenerativeSampler:
    """Batches of sequences from all sources as one stream: an epoch is one permutation, batches go across its end.

    Args:
        source_sizes: records of each source.
        batch_size: sequences of a global batch.
        seed: seed of the data order.

    Raises:
        ConfigError: there are no records.
    """

    def __init__(self, source_sizes: Sequence[int], batch_size: int, seed: int) -> None:
        self._ends = np.cumsum(source_sizes, dtype=np.int64)
        self._size = int(self._ends[-1]) if len(self._ends) else 0
        if self._size == 0:
            raise ConfigError("data.generative has no records")
        self._batch_size = batch_size
        self._seed = seed
        self._epoch = functools.lru_cache(maxsize=2)(self._draw_epoch)

    def batch(self, step: int) -> list[tuple[int, int]]:
        """Source and record of each slot of a step."""
        positions = np.arange(step * self._batch_size, (step + 1) * self._batch_size)
        epochs, within = positions // self._size, positions % self._size
        records = np.empty_like(positions)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            records[chosen] = self._epoch(int(epoch))[within[chosen]]
        sources = np.searchsorted(self._ends, records, side="right")
        starts = np.concatenate(([0], self._ends[:-1]))
        return list(zip(sources.tolist(), (records - starts[sources]).tolist(), strict=True))

    def _draw_epoch(self, epoch: int) -> np.ndarray:
        return _permutation(self._size, self._seed, _Stream.GENERATIVE_RECORDS, epoch)


def passage_draws(seed: int, step: int, num_queries: int, group_size: int) -> np.ndarray:
    """Random numbers that pick the passages of a step: uint64 [num_queries, group_size], a row for each slot."""
    return _draw(num_queries * group_size, seed, _Stream.PASSAGES, step).reshape(num_queries, group_size)


def pick_passages(draws: np.ndarray, num_positives: int, num_negatives: int) -> tuple[int, list[int]]:
    """One positive and ``len(draws) - 1`` negatives of a query.

    Negatives come without replacement; where there are too few, from as many copies of the list as are needed.

    Args:
        draws: uint64 [group_size], a row of :func:`passage_draws`.
        num_positives: positives to choose from.
        num_negatives: negatives to choose from.

    Returns:
        Index of the positive, indices of the negatives.

    Raises:
        ConfigError: negatives are wanted and there are none.
    """
    wanted = len(draws) - 1
    positive = int(draws[0]) % num_positives
    if not wanted:
        return positive, []
    if not num_negatives:
        raise ConfigError("negatives are wanted and there are none; set data.train_group_size to 1")
    pool = list(range(num_negatives)) * -(-wanted // num_negatives)
    for place in range(wanted):  # the beginning of a Fisher-Yates shuffle
        other = place + int(draws[1 + place]) % (len(pool) - place)
        pool[place], pool[other] = pool[other], pool[place]
    return positive, pool[:wanted]
