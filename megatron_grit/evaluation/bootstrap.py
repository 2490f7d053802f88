"""Percentile bootstrap intervals: how much a figure would vary with other test items."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from megatron_grit.retrieval.shares import interval_of_few

_CELLS_PER_BLOCK = 4_000_000


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A figure and its bootstrap interval."""

    value: float
    low: float
    high: float

    def overlaps(self, other: Interval) -> bool:
        """Whether the two intervals share a point."""
        return self.low <= other.high and other.low <= self.high

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def bootstrap_ratio(
    numerators: np.ndarray,
    denominators: np.ndarray,
    *,
    num_resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Interval of ``sum(numerators) / sum(denominators)`` under resampling of the items.

    For items of different weight: the loss of a corpus is a sum over documents divided by a sum of tokens, and
    documents, not tokens, are independent.

    Args:
        numerators: [n] one number for each item.
        denominators: [n] positive weight of each item.
        confidence: coverage of the interval.

    Raises:
        ValueError: no items, unequal lengths, or a weight that is not positive.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, section 13.3.
    """
    numerators = np.asarray(numerators, dtype=np.float64)
    denominators = np.asarray(denominators, dtype=np.float64)
    n = len(numerators)
    if numerators.ndim != 1 or numerators.shape != denominators.shape or n == 0:
        raise ValueError(f"need two equally long vectors, not {numerators.shape} and {denominators.shape}")
    if not (denominators > 0).all():
        raise ValueError("every denominator must be positive")
    rng = np.random.default_rng(seed)
    estimates = []
    block = max(1, _CELLS_PER_BLOCK // n)
    for start in range(0, num_resamples, block):
        items = rng.integers(n, size=(min(block, num_resamples - start), n))
        estimates.append(numerators[items].sum(1) / denominators[items].sum(1))
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(estimates), [tail, 1 - tail])
    return Interval(value=float(numerators.sum() / denominators.sum()), low=float(low), high=float(high))


def bootstrap_statistic(
    statistic: Callable[[np.ndarray], float],
    n: int,
    *,
    num_resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Interval of what is computed of the items by their indices, such as a correlation.

    Args:
        statistic: takes int64 [n], indices of items, some of them repeated.
        n: number of items.
        num_resamples: as for :func:`bootstrap_ratio`, and so are the others.
    """
    rng = np.random.default_rng(seed)
    estimates = [statistic(rng.integers(n, size=n)) for _ in range(num_resamples)]
    tail = (1 - confidence) / 2
    low, high = np.quantile(estimates, [tail, 1 - tail])
    return Interval(value=statistic(np.arange(n)), low=float(low), high=float(high))


def bootstrap_mean(
    values: np.ndarray, *, num_resamples: int = 2000, confidence: float = 0.95, seed: int = 0
) -> Interval:
    """Interval of the mean of ``values`` [n]; see :func:`bootstrap_ratio`. Of few shares, and of those that are all
    alike, it is Wilson's (:func:`~megatron_grit.retrieval.shares.interval_of_few`), always of 95 %."""
    values = np.asarray(values, dtype=np.float64)
    if values.ndim == 1 and len(values) and (few := interval_of_few(values)) is not None:
        return Interval(value=float(values.mean()), low=few[0], high=few[1])
    return bootstrap_ratio(values, np.ones_like(values), num_resamples=num_resamples, confidence=confidence, seed=seed)
