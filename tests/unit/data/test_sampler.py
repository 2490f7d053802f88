"""Samplers: order is a function of (seed, step, slot), epochs cover, batches have one source."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_grit.data.sampler import EmbeddingSampler, GenerativeSampler, passage_draws, pick_passages
from megatron_grit.errors import ConfigError

GOLDEN_EMBEDDING = (0, [11, 6, 9, 7])
GOLDEN_GENERATIVE = [(1, 4), (0, 1), (0, 6), (0, 9), (0, 7), (1, 0)]
GOLDEN_PASSAGES = [(0, [0, 1, 3]), (0, [2, 3, 0]), (0, [0, 1, 3])]

SIZES = st.lists(st.integers(5, 40), min_size=1, max_size=4)


@given(sizes=SIZES, batch_size=st.integers(1, 5), seed=st.integers(0, 2**40))
def test_a_round_is_an_epoch_of_every_source(sizes: list[int], batch_size: int, seed: int) -> None:
    sampler = EmbeddingSampler(sizes, batch_size, seed)
    assert sampler.steps_per_round == sum(size // batch_size for size in sizes)
    for number in range(2):
        steps = range(number * sampler.steps_per_round, (number + 1) * sampler.steps_per_round)
        seen: Counter[tuple[int, int]] = Counter()
        visits: Counter[int] = Counter()
        for step in steps:
            source, records = sampler.batch(step)
            assert len(set(records.tolist())) == batch_size
            assert records.min() >= 0 and records.max() < sizes[source]
            seen.update((source, record) for record in records.tolist())
            visits[source] += 1
        assert set(seen.values()) == {1}
        assert visits == {source: size // batch_size for source, size in enumerate(sizes)}


@given(sizes=SIZES, step=st.integers(0, 10**6), seed=st.integers(0, 100))
def test_a_step_does_not_depend_on_those_before(sizes: list[int], step: int, seed: int) -> None:
    embedding, generative = EmbeddingSampler(sizes, 3, seed), GenerativeSampler(sizes, 7, seed)
    for earlier in range(max(0, step - 3), step):
        embedding.batch(earlier)
        generative.batch(earlier)
    source, records = embedding.batch(step)
    fresh_source, fresh_records = EmbeddingSampler(sizes, 3, seed).batch(step)
    assert (source, records.tolist()) == (fresh_source, fresh_records.tolist())
    assert generative.batch(step) == GenerativeSampler(sizes, 7, seed).batch(step)


@given(sizes=st.lists(st.integers(0, 9), min_size=1, max_size=4).filter(sum), batch_size=st.integers(1, 25))
def test_generative_epochs_cover_across_batches(sizes: list[int], batch_size: int) -> None:
    sampler = GenerativeSampler(sizes, batch_size, 5)
    total = sum(sizes)
    stream = [item for step in range(-(-3 * total // batch_size)) for item in sampler.batch(step)]
    everything = {(source, record) for source, size in enumerate(sizes) for record in range(size)}
    epochs = [stream[epoch * total : (epoch + 1) * total] for epoch in range(3)]
    for epoch in epochs:
        assert len(epoch) == total and set(epoch) == everything


def test_epochs_and_seeds_differ() -> None:
    sampler = GenerativeSampler([64], 64, 0)
    orders = [sampler.batch(0), sampler.batch(1), GenerativeSampler([64], 64, 1).batch(0)]
    assert len({tuple(order) for order in orders}) == 3
    embedding = EmbeddingSampler([64, 64], 64, 0)
    orders = [tuple(embedding.batch(step)[1].tolist()) for step in range(4)]
    assert len(set(orders)) == 4


def test_golden_order() -> None:
    """The order of data belongs to a run: a change of NumPy or of this code must not move it."""
    source, records = EmbeddingSampler([20, 30], 4, 42).batch(17)
    assert (source, records.tolist()) == GOLDEN_EMBEDDING
    assert GenerativeSampler([10, 5], 6, 42).batch(3) == GOLDEN_GENERATIVE
    assert [pick_passages(row, 3, 4) for row in passage_draws(42, 9, 3, 4)] == GOLDEN_PASSAGES


def test_source_smaller_than_a_batch_is_named() -> None:
    with pytest.raises(ConfigError, match="source small has 3 records, fewer than training.embedding_batch_size 4"):
        EmbeddingSampler([9, 3], 4, 0, ["large", "small"])
    with pytest.raises(ConfigError, match="no records"):
        GenerativeSampler([0], 4, 0)


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
