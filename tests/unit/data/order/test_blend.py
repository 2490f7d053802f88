"""Blends: the order of sources against a sorted list, proportions at every moment, epochs, caps."""

from __future__ import annotations

import time
from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megatron_grit.config.blend import BlendEntry
from megatron_grit.data.order.blend import RecordOrder, StrideSchedule, blend_weights

WEIGHTS = st.lists(st.one_of(st.floats(0.01, 100), st.integers(1, 9).map(float)), min_size=1, max_size=8)


def sorted_visits(weights: list[float], count: int) -> list[tuple[int, int]]:
    """The rule written the plain way: the smallest of (k + 1/2) / w, ties by number of the source."""
    places = [((k + 0.5) / weight, source, k) for source, weight in enumerate(weights) for k in range(count)]
    return [(source, k) for _, source, k in sorted(places)[:count]]


@given(weights=WEIGHTS, start=st.integers(0, 150), length=st.integers(0, 60))
def test_slots_are_the_sorted_visits(weights: list[float], start: int, length: int) -> None:
    expected = sorted_visits(weights, start + length)
    sources, visits = StrideSchedule(weights).slots(start, start + length)
    assert list(zip(sources.tolist(), visits.tolist(), strict=True)) == expected[start:]
    counts = Counter(source for source, _ in expected)
    assert StrideSchedule(weights).counts(start + length).tolist() == [counts[s] for s in range(len(weights))]


@given(weights=WEIGHTS, num_slots=st.integers(0, 10**12))
def test_proportions_hold_at_every_moment(weights: list[float], num_slots: int) -> None:
    counts = StrideSchedule(weights).counts(num_slots)
    assert counts.sum() == num_slots
    share = num_slots * np.array(weights) / sum(weights)
    assert np.abs(counts - share).max() <= max(1, len(weights) / 2) + 1e-3
    sources, visits = StrideSchedule(weights).slots(num_slots, num_slots + 1)
    assert visits[0] == counts[sources[0]]


def test_a_thousand_sources_far_along_are_quick() -> None:
    schedule = StrideSchedule(np.random.default_rng(0).lognormal(size=1000))
    schedule.slots(0, 256)
    start = time.process_time()
    for step in range(20):
        schedule.slots(10**11 + 256 * step, 10**11 + 256 * (step + 1))
    assert (time.process_time() - start) / 20 < 0.02


@given(sizes=st.lists(st.integers(1, 12), min_size=1, max_size=5), num_epochs=st.integers(1, 3))
def test_no_record_comes_again_before_its_source_is_exhausted(sizes: list[int], num_epochs: int) -> None:
    order = RecordOrder(sizes, [None] * len(sizes), np.uint64(1))
    sources, visits = StrideSchedule(sizes).slots(0, num_epochs * sum(sizes))
    records = order.at(sources, visits)
    for source, size in enumerate(sizes):
        taken = records[sources == source].tolist()
        assert len(taken) == num_epochs * size
        for epoch in range(num_epochs):
            assert sorted(taken[epoch * size : (epoch + 1) * size]) == list(range(size))


def test_sources_and_epochs_have_orders_of_their_own() -> None:
    order = RecordOrder([50, 50], [None, None], np.uint64(1))
    visits = np.arange(100)
    orders = [order.at(np.full(100, source), visits)[half] for source in (0, 1) for half in (slice(50), slice(50, 100))]
    assert len({tuple(taken.tolist()) for taken in orders}) == 4


@given(size=st.integers(1, 60), cap=st.integers(1, 80), key=st.integers(0, 50))
def test_a_cap_takes_the_same_subset_in_every_epoch(size: int, cap: int, key: int) -> None:
    order = RecordOrder([size], [cap], np.uint64(key))
    used = min(size, cap)
    assert order.sizes.tolist() == [used]
    epochs = order.at(np.zeros(3 * used, dtype=np.int64), np.arange(3 * used)).reshape(3, used)
    assert len({tuple(sorted(epoch)) for epoch in epochs.tolist()}) == 1
    assert len(set(epochs[0].tolist())) == used and epochs.max() < size
    members = order.subset(0)
    assert (members is None) == (used == size)
    if members is not None:
        assert sorted(members.tolist()) == sorted(epochs[0].tolist())


def test_the_subset_of_a_cap_is_drawn_by_the_seed() -> None:
    subsets = [RecordOrder([1000], [10], np.uint64(key)).subset(0) for key in range(20)]
    assert len({tuple(sorted(subset.tolist())) for subset in subsets if subset is not None}) == 20


def test_weights() -> None:
    sizes = np.array([10, 30])
    plain = [BlendEntry(path="a"), BlendEntry(path="b")]
    assert blend_weights(plain, sizes).tolist() == [10, 30]
    assert blend_weights([BlendEntry(path="a", epochs=2.5), plain[1]], sizes).tolist() == [25, 30]
    weighted = [BlendEntry(path="a", weight=0.2), BlendEntry(path="b", weight=0.8)]
    assert blend_weights(weighted, sizes).tolist() == [0.2, 0.8]
