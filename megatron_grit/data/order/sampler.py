"""Which records a step trains on: pure functions of (seed, step, slot).

Nothing here keeps a position. The same step gives the same records for any data parallel size, number of workers or
restart, and a run is resumed by asking for the next step.

Random numbers are the raw output of Philox, keyed through SeedSequence: NumPy keeps both streams fixed between
versions, which it does not promise for shuffles. Permutations are those of :mod:`megatron_grit.data.order.permutation`.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from enum import IntEnum

import numpy as np

from megatron_grit.data.order.blend import RecordOrder, StrideSchedule
from megatron_grit.data.order.permutation import derive_keys, find
from megatron_grit.data.order.shared_texts import BoundRecords, EpochPlan, plan_epoch
from megatron_grit.errors import ConfigError

_PLANS_KEPT = 4096


class Stream(IntEnum):
    """Keeps the draws of different decisions apart. Part of the data order: never renumber."""

    EMBEDDING_RECORDS = 1
    GENERATIVE_RECORDS = 2
    PASSAGES = 3
    EXCHANGES = 4
    ROWS = 5
    NOISE = 6


def _draw(count: int, seed: int, stream: int, *key: int) -> np.ndarray:
    """uint64 [count], a function of the arguments alone."""
    sequence = np.random.SeedSequence(entropy=seed, spawn_key=(int(stream), *key))
    return np.random.Philox(sequence).random_raw(count)


def stream_of(kind: str) -> int:
    """Number of the random stream that orders the records of a kind whose name is not in :class:`Stream`."""
    return int.from_bytes(hashlib.sha256(kind.encode()).digest()[:4], "little") | 1 << 31


def stream_key(seed: int, stream: int) -> np.uint64:
    """Key of a stream's permutations."""
    return _draw(1, seed, stream)[0]


def noise_keys(seed: int, step: int, slots: np.ndarray) -> list[int]:
    """Seed of the noise on the embeddings of each of some segments.

    Args:
        seed: of the data order.
        step: from 0.
        slots: int64, places of the segments among those of their kind in the global batch.
    """
    return (derive_keys(_draw(1, seed, Stream.NOISE, step)[0], slots) >> np.uint64(1)).tolist()


class EmbeddingSampler:
    """Batches of queries, each from one source.

    Sources come up in proportion to their weights ** (1 / temperature), evenly spread over the steps. Within a source
    an epoch is a permutation of its own, cut into batches; the last ``size % batch_size`` records of it are left out,
    so no record comes twice in a batch.

    Args:
        order: the records of the sources, each of which has at least a batch of them.
        batch_size: queries of a global batch.
        seed: seed of the data order.
        names: of the sources, for messages.
        weights: of the sources. None: whole batches in an epoch, so that all epochs end together.
        temperature: 1 keeps the weights, more brings them closer to each other.
        bound: gives the records of a source that share a text. None: they may share a batch.
    """

    def __init__(
        self,
        order: RecordOrder,
        batch_size: int,
        seed: int,
        names: Sequence[str],
        *,
        weights: np.ndarray | None = None,
        temperature: float = 1.0,
        bound: Callable[[int], BoundRecords] | None = None,
    ) -> None:
        self.order = order
        self._batch_size, self._names = batch_size, names
        self._full_batches = order.sizes // batch_size
        self._schedule = StrideSchedule((self._full_batches if weights is None else weights) ** (1.0 / temperature))
        self._exchange_key = stream_key(seed, Stream.EXCHANGES)
        self._ends: dict[int, list[int]] = {}
        self._bound = None if bound is None else functools.cache(lambda source: self._within_cap(bound, source))
        self._plan = functools.lru_cache(maxsize=_PLANS_KEPT)(self._plan_epoch)

    def batch(self, step: int) -> tuple[int, np.ndarray]:
        """Source of a step, and the records it takes of it: int64 [batch_size].

        Raises:
            ConfigError: no batch of the source can be filled without a common text.
        """
        sources, visits = self._schedule.slots(step, step + 1)
        source, visit = int(sources[0]), int(visits[0])
        epoch, number = self._epoch_of(source, visit)
        if self._bound is not None and len(self._bound(source)):
            places = self._plan(source, epoch).batch(number)
        else:
            places = np.arange(number * self._batch_size, (number + 1) * self._batch_size)
        return source, self.order.in_epoch(np.full(self._batch_size, source), epoch, places)

    def counts(self, num_steps: int) -> np.ndarray:
        """Queries of each source in the first steps: int64 [num_sources]."""
        return self._schedule.counts(num_steps) * self._batch_size

    def left_out(self, source: int, epoch: int) -> int:
        """Records of a source that an epoch leaves out: the surplus of shared texts, and what fills no batch."""
        if self._bound is None or not len(self._bound(source)):
            num_batches = int(self._full_batches[source])
        else:
            num_batches = self._plan(source, epoch).num_batches
        return int(self.order.sizes[source]) - num_batches * self._batch_size

    def _epoch_of(self, source: int, visit: int) -> tuple[int, int]:
        """Epoch of a visit and the batch's number within it. How many batches shared texts leave is up to the epoch."""
        if self._bound is None or not len(self._bound(source)):
            return divmod(visit, int(self._full_batches[source]))
        ends = self._ends.setdefault(source, [0])
        while ends[-1] <= visit:
            ends.append(ends[-1] + self._plan(source, len(ends) - 1).num_batches)
        epoch = int(np.searchsorted(ends, visit, side="right")) - 1
        return epoch, visit - ends[epoch]

    def _plan_epoch(self, source: int, epoch: int) -> EpochPlan:
        assert self._bound is not None
        bound, size = self._bound(source), int(self.order.sizes[source])
        places = find(bound.records, size, self.order.epoch_key(source, epoch))
        key = int(derive_keys(self._exchange_key, source, epoch))
        plan = plan_epoch(places, bound, size, self._batch_size, key)
        if not plan.num_batches:
            raise ConfigError(
                f"source {self._names[source]} has no {self._batch_size} records without a query or positive in "
                "common; lower training.embedding_batch_size, or set data.allow_shared_texts"
            )
        return plan

    def _within_cap(self, bound: Callable[[int], BoundRecords], source: int) -> BoundRecords:
        return bound(source).within(self.order.subset(source))


class GenerativeSampler:
    """One stream of records from all sources, each in its share at every moment.

    Args:
        order: the records of the sources.
        weights: samples of each source, relative to each other. None: its size, so that all epochs end together.

    Raises:
        ConfigError: there are no records.
    """

    def __init__(self, order: RecordOrder, weights: np.ndarray | None = None) -> None:
        if not len(order.sizes) or not order.sizes.all():
            raise ConfigError("there is a source without records")
        self.order = order
        self._schedule = StrideSchedule(order.sizes if weights is None else weights)

    def slots(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Source and record of each slot of the stream from ``start`` to ``stop - 1``: int64 each."""
        sources, visits = self._schedule.slots(start, stop)
        return sources, self.order.at(sources, visits)

    def counts(self, num_slots: int) -> np.ndarray:
        """Records of each source in the first slots: int64 [num_sources]."""
        return self._schedule.counts(num_slots)


def passage_draws(seed: int, step: int, num_queries: int, group_size: int) -> np.ndarray:
    """Random numbers that pick the passages of a step: uint64 [num_queries, group_size], a row for each slot."""
    return _draw(num_queries * group_size, seed, Stream.PASSAGES, step).reshape(num_queries, group_size)


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
