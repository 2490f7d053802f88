"""Samplers: order is a function of (seed, step, slot), epochs cover, batches have one source and no text twice."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_grit.data.order.blend import RecordOrder
from megatron_grit.data.order.sampler import (
    EmbeddingSampler,
    GenerativeSampler,
    Stream,
    passage_draws,
    pick_passages,
    stream_key,
)
from megatron_grit.data.order.shared_texts import BoundRecords
from megatron_grit.errors import ConfigError

GOLDEN_EMBEDDING = (0, [13, 2, 18, 12])
GOLDEN_GENERATIVE = [(0, 1), (1, 2), (0, 7), (0, 0), (1, 1), (0, 8)]
GOLDEN_PASSAGES = [(0, [0, 1, 3]), (0, [2, 3, 0]), (0, [0, 1, 3])]

SIZES = st.lists(st.integers(5, 40), min_size=1, max_size=4)


def record_order(sizes: list[int], seed: int, stream: Stream, caps: list[int | None] | None = None) -> RecordOrder:
    return RecordOrder(sizes, caps or [None] * len(sizes), stream_key(seed, stream))


def embedding(sizes: list[int], batch_size: int, seed: int, caps=None, **options) -> EmbeddingSampler:
    order = record_order(sizes, seed, Stream.EMBEDDING_RECORDS, caps)
    return EmbeddingSampler(order, batch_size, seed, [f"s{index}" for index in range(len(sizes))], **options)


def generative(sizes: list[int], seed: int, weights: np.ndarray | None = None) -> GenerativeSampler:
    return GenerativeSampler(record_order(sizes, seed, Stream.GENERATIVE_RECORDS), weights)


@given(sizes=SIZES, batch_size=st.integers(1, 5), seed=st.integers(0, 2**40))
def test_all_sources_end_an_epoch_together(sizes: list[int], batch_size: int, seed: int) -> None:
    sampler = embedding(sizes, batch_size, seed)
    steps = sum(size // batch_size for size in sizes)
    for number in range(2):
        seen: Counter[tuple[int, int]] = Counter()
        for step in range(number * steps, (number + 1) * steps):
            source, records = sampler.batch(step)
            assert len(set(records.tolist())) == batch_size
            assert records.min() >= 0 and records.max() < sizes[source]
            seen.update((source, record) for record in records.tolist())
        assert set(seen.values()) == {1}
        counts = Counter(source for source, _ in seen)
        assert counts == {source: size // batch_size * batch_size for source, size in enumerate(sizes)}
    assert sampler.counts(steps).tolist() == [size // batch_size * batch_size for size in sizes]


@given(sizes=SIZES, step=st.integers(0, 10**6), seed=st.integers(0, 100))
def test_a_step_does_not_depend_on_those_before(sizes: list[int], step: int, seed: int) -> None:
    sampler, stream = embedding(sizes, 3, seed), generative(sizes, seed)
    for earlier in range(max(0, step - 3), step):
        sampler.batch(earlier)
        stream.slots(7 * earlier, 7 * earlier + 7)
    source, records = sampler.batch(step)
    fresh_source, fresh_records = embedding(sizes, 3, seed).batch(step)
    assert (source, records.tolist()) == (fresh_source, fresh_records.tolist())
    slots = [part.tolist() for part in stream.slots(7 * step, 7 * step + 7)]
    assert slots == [part.tolist() for part in generative(sizes, seed).slots(7 * step, 7 * step + 7)]


@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4), cuts=st.lists(st.integers(1, 9), max_size=8))
def test_generative_epochs_cover_whatever_the_batches(sizes: list[int], cuts: list[int]) -> None:
    sampler, total = generative(sizes, 5), sum(sizes)
    bounds = np.unique([0, *np.cumsum(cuts).clip(max=3 * total).tolist(), 3 * total]).tolist()
    parts = [sampler.slots(start, stop) for start, stop in zip(bounds[:-1], bounds[1:], strict=True)]
    sources, records = (np.concatenate(column) for column in zip(*parts, strict=True))
    stream = list(zip(sources.tolist(), records.tolist(), strict=True))
    everything = {(source, record) for source, size in enumerate(sizes) for record in range(size)}
    for epoch in range(3):
        assert set(stream[epoch * total : (epoch + 1) * total]) == everything
    assert sampler.counts(2 * total).tolist() == [2 * size for size in sizes]


def test_epochs_and_seeds_differ() -> None:
    sampler = generative([64], 0)
    orders = [sampler.slots(0, 64), sampler.slots(64, 128), generative([64], 1).slots(0, 64)]
    assert len({tuple(records.tolist()) for _, records in orders}) == 3
    batches = [tuple(embedding([64, 64], 64, 0).batch(step)[1].tolist()) for step in range(4)]
    assert len(set(batches)) == 4
    assert tuple(embedding([64, 64], 64, 1).batch(0)[1].tolist()) not in batches


def test_weights_and_temperature() -> None:
    def shares(**options: object) -> list[int]:
        return embedding([100, 400, 1600], 10, 0, **options).counts(2100).tolist()

    assert shares() == [1000, 4000, 16000]
    assert shares(temperature=2.0) == [3000, 6000, 12000]
    assert shares(weights=np.array([1.0, 1.0, 5.0])) == [3000, 3000, 15000]
    assert max(np.abs(np.array(shares(temperature=1e6)) - 7000)) <= 10
    sampler = embedding([100, 400, 1600], 10, 0, temperature=2.0)
    sources = Counter(sampler.batch(step)[0] for step in range(210))
    assert sources == {0: 30, 1: 60, 2: 120}


def test_a_weighted_source_is_exhausted_before_it_repeats() -> None:
    sampler = generative([5, 50], 3, np.array([1.0, 1.0]))
    sources, records = sampler.slots(0, 60)
    small, large = records[sources == 0].tolist(), records[sources == 1].tolist()
    assert len(small) == len(large) == 30
    assert len(set(large)) == 30
    assert all(sorted(small[epoch * 5 : epoch * 5 + 5]) == list(range(5)) for epoch in range(6))


def test_a_cap_holds() -> None:
    sampler = embedding([40, 40], 4, 1, caps=[8, None])
    seen: dict[int, set[int]] = {0: set(), 1: set()}
    for step in range(36):  # three epochs
        source, records = sampler.batch(step)
        seen[source] |= set(records.tolist())
    assert (len(seen[0]), len(seen[1])) == (8, 40)
    assert max(seen[0]) > 7  # a random subset, not the first


@given(data=st.data(), batch_size=st.integers(2, 6), cap=st.one_of(st.none(), st.integers(20, 60)))
def test_no_batch_holds_a_text_twice(data: st.DataObject, batch_size: int, cap: int | None) -> None:
    texts = np.array(data.draw(st.lists(st.integers(0, 40), min_size=40, max_size=40)))
    bound = BoundRecords.from_pairs(np.arange(40), texts.astype(np.uint64))
    nothing = BoundRecords.from_pairs(np.arange(30), np.arange(30).astype(np.uint64))
    assert not len(nothing)

    def sampler() -> EmbeddingSampler:
        return embedding([40, 30], batch_size, 11, [cap, None], bound=lambda source: (bound, nothing)[source])

    try:
        sampler().left_out(0, 0)
    except ConfigError:  # nearly all texts are one
        assert Counter(texts.tolist()).most_common(1)[0][1] > 40 // batch_size
        return
    running = sampler()
    seen: dict[int, set[int]] = {}
    for step in range(40):
        source, records = running.batch(step)
        fresh_source, fresh_records = sampler().batch(step) if step % 13 == 0 else (source, records)
        assert (fresh_source, fresh_records.tolist()) == (source, records.tolist())
        if source == 0:
            assert len(set(texts[records].tolist())) == batch_size
            epoch, _ = running._epoch_of(0, int(running._schedule.slots(step, step + 1)[1][0]))
            assert not seen.setdefault(epoch, set()) & set(records.tolist())
            seen[epoch] |= set(records.tolist())
    used = min(cap or 40, 40)
    for epoch in range(max(seen)):
        assert len(seen[epoch]) == used - running.left_out(0, epoch)


def test_a_batch_that_cannot_be_filled() -> None:
    bound = BoundRecords.from_pairs(np.arange(40), np.repeat(np.arange(4), 10).astype(np.uint64))
    sampler = embedding([40], 5, 0, bound=lambda source: bound)
    with pytest.raises(ConfigError, match="source s0 has no 5 records without a query or positive in common; lower"):
        sampler.batch(0)
    assert embedding([40], 4, 0, bound=lambda source: bound).batch(9)[1].shape == (4,)


def test_golden_order() -> None:
    """The order of data belongs to a run: a change of NumPy or of this code must not move it."""
    source, records = embedding([20, 30], 4, 42).batch(17)
    assert (source, records.tolist()) == GOLDEN_EMBEDDING
    sources, records = generative([10, 5], 42).slots(18, 24)
    assert list(zip(sources.tolist(), records.tolist(), strict=True)) == GOLDEN_GENERATIVE
    assert [pick_passages(row, 3, 4) for row in passage_draws(42, 9, 3, 4)] == GOLDEN_PASSAGES


def test_source_without_records_is_refused() -> None:
    with pytest.raises(ConfigError, match="without records"):
        generative([4, 0], 0)


@given(num_positives=st.integers(1, 4), num_negatives=st.integers(1, 6), group_size=st.integers(1, 9))
def test_passages_are_spread_evenly(num_positives: int, num_negatives: int, group_size: int) -> None:
    for draws in passage_draws(3, 1, 5, group_size):
        positive, negatives = pick_passages(draws, num_positives, num_negatives)
        assert 0 <= positive < num_positives
        assert len(negatives) == group_size - 1
        counts = Counter(negatives)
        assert set(counts) <= set(range(num_negatives))
        copies = -(-(group_size - 1) // num_negatives)
        assert max(counts.values(), default=0) <= copies


def test_every_passage_is_picked_about_equally() -> None:
    picks = [pick_passages(draws, 3, 5) for draws in passage_draws(0, 0, 6000, 3)]
    positives = Counter(positive for positive, _ in picks)
    negatives = Counter(negative for _, pair in picks for negative in pair)
    assert all(abs(count - 2000) < 5 * 2000**0.5 for count in positives.values())
    assert all(abs(count - 2400) < 5 * 2400**0.5 for count in negatives.values())


def test_a_slot_has_its_own_draws() -> None:
    draws = passage_draws(7, 2, 6, 3)
    assert np.array_equal(draws, passage_draws(7, 2, 9, 3)[:6])
    assert len(np.unique(draws)) == draws.size
    assert not np.array_equal(draws, passage_draws(7, 3, 6, 3))


def test_negatives_that_are_not_there() -> None:
    (draws,) = passage_draws(0, 0, 1, 2)
    with pytest.raises(ConfigError, match="set data.train_group_size to 1"):
        pick_passages(draws, 1, 0)
    assert pick_passages(draws[:1], 1, 0) == (0, [])
