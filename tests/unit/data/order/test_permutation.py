"""Permutations that are not built: each a bijection with its inverse, all orders equally likely."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_grit.data.order import permutation
from megatron_grit.data.order.permutation import derive_keys, find, permute

KEYS = st.integers(0, 2**64 - 1)
GOLDEN = [5, 0, 3, 8, 9, 2, 1, 7, 6, 4]
GOLDEN_BIG = [123568231592, 53544467730]


@given(size=st.integers(1, 400), key=KEYS)
def test_every_record_once_and_back(size: int, key: int) -> None:
    order = permute(np.arange(size), size, key)
    assert sorted(order.tolist()) == list(range(size))
    assert find(order, size, key).tolist() == list(range(size))


@given(size=st.integers(1, 2**40), key=KEYS, places=st.lists(st.integers(0, 2**40), max_size=20))
def test_large_orders(size: int, key: int, places: list[int]) -> None:
    inside = np.array(places, dtype=np.int64) % size
    order = permute(inside, size, key)
    assert ((order >= 0) & (order < size)).all()
    assert find(order, size, key).tolist() == inside.tolist()


@given(cases=st.lists(st.tuples(st.integers(1, 50), KEYS, st.integers(0, 10**6)), min_size=1, max_size=20))
def test_many_orders_at_once(cases: list[tuple[int, int, int]]) -> None:
    sizes, places = (np.array([case[column] for case in cases]) for column in (0, 2))
    together = permute(places % sizes, sizes, np.array([key for _, key, _ in cases], dtype=np.uint64))
    alone = [int(permute(np.array([place % size]), size, key)[0]) for size, key, place in cases]
    assert together.tolist() == alone


def chi_square(counts: np.ndarray) -> float:
    """Distance from equal counts in standard deviations of the chi-square distribution."""
    expected, freedom = counts.sum() / len(counts), len(counts) - 1
    return float((((counts - expected) ** 2).sum() / expected - freedom) / math.sqrt(2 * freedom))


def orders(size: int, num_keys: int) -> np.ndarray:
    keys = np.broadcast_to(derive_keys(5, np.arange(num_keys))[:, None], (num_keys, size))
    return permute(np.broadcast_to(np.arange(size), keys.shape), size, keys)


def distance_from_uniform(size: int, num_keys: int = 24_000) -> float:
    counts = Counter(map(tuple, orders(size, num_keys).tolist()))
    return chi_square(np.array([counts[order] for order in itertools.permutations(range(size))]))


@pytest.mark.parametrize("size", [2, 3, 4, 5, 6])
def test_all_orders_are_equally_likely(size: int) -> None:
    assert abs(distance_from_uniform(size)) < 4


def test_too_few_rounds_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(permutation, "_NUM_ROUNDS", 4)
    assert distance_from_uniform(5) > 10


@pytest.mark.parametrize("size", [7, 9, 30, 101])
def test_every_record_at_every_place(size: int) -> None:
    drawn = orders(size, 4000)
    for place in (0, size // 2, size - 1):
        assert abs(chi_square(np.bincount(drawn[:, place], minlength=size))) < 4.5
    differences = (drawn[:, 1] - drawn[:, 0]) % size
    assert abs(chi_square(np.bincount(differences, minlength=size)[1:])) < 4.5


def test_keys_give_unrelated_orders() -> None:
    keys = derive_keys(1, np.arange(1000)[:, None], np.arange(3)[None])
    assert len(np.unique(keys)) == 3000
    assert derive_keys(1, 2, 3) != derive_keys(1, 3, 2)
    first, second = (permute(np.arange(5000), 5000, key) for key in (keys[0, 0], keys[0, 1]))
    assert (first == second).sum() < 12  # one, on average, stays in its place


def test_golden_order() -> None:
    """The order of data belongs to a run: no change may move it."""
    assert permute(np.arange(10), 10, 42).tolist() == GOLDEN
    assert permute(np.array([0, 10**11]), 10**12, 42).tolist() == GOLDEN_BIG
