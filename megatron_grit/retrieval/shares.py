"""Intervals of a mean of shares where resampling says too little."""

from __future__ import annotations

import math

import numpy as np

FEW = 30
_NORMAL = 1.959964


def interval_of_few(values: np.ndarray) -> tuple[float, float] | None:
    """Wilson's 95 % interval of a mean of numbers from 0 to 1 that are fewer than :data:`FEW`, or all alike: a resample
    of them hardly differs, and of a single one never. None: of others, which can be resampled.

    It holds for any numbers from 0 to 1, which vary at most as zeros and ones of the same mean do.

    Args:
        values: [n], at least one.

    Source: Wilson, Probable inference, the law of succession, and statistical inference, JASA 22, 1927.
    """
    count, low, high = len(values), float(values.min()), float(values.max())
    if low < 0 or high > 1 or (count >= FEW and low < high):
        return None
    mean, square = float(values.mean()), _NORMAL**2
    middle = (mean + square / (2 * count)) / (1 + square / count)
    half = _NORMAL / (1 + square / count) * math.sqrt(mean * (1 - mean) / count + square / (4 * count**2))
    return min(mean, max(0.0, middle - half)), max(mean, min(1.0, middle + half))
