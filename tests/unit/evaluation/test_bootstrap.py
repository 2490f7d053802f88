from __future__ import annotations

import numpy as np
import pytest

from megatron_grit.evaluation.bootstrap import Interval, bootstrap_mean, bootstrap_ratio


def test_interval_of_a_proportion_is_the_binomial_one() -> None:
    values = np.zeros(400)
    values[:100] = 1
    interval = bootstrap_mean(values, num_resamples=20_000)
    spread = 1.959964 * np.sqrt(0.25 * 0.75 / 400)
    assert interval.value == 0.25
    assert interval.low == pytest.approx(0.25 - spread, abs=0.003)
    assert interval.high == pytest.approx(0.25 + spread, abs=0.003)


def test_coverage_is_near_95_percent() -> None:
    rng = np.random.default_rng(1)
    samples = rng.exponential(size=(300, 100))
    intervals = [bootstrap_mean(sample, num_resamples=500, seed=i) for i, sample in enumerate(samples)]
    covered = np.mean([interval.low <= 1 <= interval.high for interval in intervals])
    assert 0.89 <= covered <= 0.98


def test_ratio_weighs_items_by_their_denominator() -> None:
    interval = bootstrap_ratio(np.array([2.0, 30.0]), np.array([1, 10]))
    assert interval.value == 32 / 11
    assert (interval.low, interval.high) == (2, 3)  # two items: a resample holds one, the other, or both


def test_blocks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).random(50)
    whole = bootstrap_mean(values, num_resamples=100, seed=3)
    monkeypatch.setattr("megatron_grit.evaluation.bootstrap._CELLS_PER_BLOCK", 350)
    assert bootstrap_mean(values, num_resamples=100, seed=3) == whole
    assert bootstrap_mean(values, num_resamples=100, seed=4) != whole


@pytest.mark.parametrize(
    ("values", "low", "high"),
    [
        ([1.0], 0.206549, 1.0),
        ([0.0], 0.0, 0.793451),
        ([1.0] * 10, 0.722467, 1.0),
        ([1.0] * 9 + [0.0], 0.595850, 0.982124),
        ([1.0] * 100, 0.963007, 1.0),
    ],
)
def test_few_shares_and_those_all_alike_have_wilsons_interval(values: list[float], low: float, high: float) -> None:
    """Of 10 of 10, 9 of 10 and so on, as published tables have it; a resample of them says too little or nothing."""
    interval = bootstrap_mean(np.array(values))
    assert interval.value == np.mean(values)
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=1e-5)


def test_other_constants_have_no_width() -> None:
    assert bootstrap_mean(np.full(10, 5.0)) == Interval(value=5.0, low=5.0, high=5.0)


@pytest.mark.parametrize(
    ("numerators", "denominators"), [([], []), ([1.0], [0]), ([1.0, 2.0], [1]), ([[1.0]], [[1]]), ([1.0], [np.nan])]
)
def test_unusable_input_is_refused(numerators: list, denominators: list) -> None:
    with pytest.raises(ValueError):
        bootstrap_ratio(np.array(numerators), np.array(denominators))


def test_overlap() -> None:
    low, middle, high = (Interval(value=v, low=v - 1, high=v + 1) for v in (0.0, 1.5, 3.0))
    assert low.overlaps(middle) and middle.overlaps(low) and middle.overlaps(high)
    assert not low.overlaps(high) and not high.overlaps(low)
