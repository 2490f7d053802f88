"""Permutations that are never built: any place of an order of 10^12 records is found in microseconds, and any record's
place in it.

A Feistel network over Z_a x Z_b, with a x b just above the size: two halves take turns in being shifted by a keyed
hash of the other one, which can be undone whatever the hash is. A place that falls outside the size is sent through
again until it falls inside (cycle walking: Black and Rogaway, Ciphers with Arbitrary Finite Domains, 2002). It
shuffles; it keeps no secrets.

Arithmetic is that of uint64, so the orders are the same on every machine and with every version of NumPy.
"""

from __future__ import annotations

import numpy as np

_NUM_ROUNDS = 10
"""Each shifts both halves. With six not all 720 orders of six records are equally likely; with ten they are."""
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mix(values: np.ndarray) -> np.ndarray:
    """A bijection of uint64 in which every bit of the input moves every bit of the output (the finaliser of
    SplitMix64: Steele, Lea and Flood 2014)."""
    with np.errstate(over="ignore"):
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def derive_keys(key: np.ndarray | np.uint64 | int, *numbers: np.ndarray | int) -> np.ndarray:
    """A key for each combination of ``numbers``: uint64, the shape that the arguments broadcast to."""
    derived = np.asarray(key, dtype=np.uint64)
    with np.errstate(over="ignore"):
        for number in numbers:
            derived = mix(derived + _GOLDEN * (np.asarray(number).astype(np.uint64) + np.uint64(1)))
    return derived


def permute(places: np.ndarray, sizes: np.ndarray | int, keys: np.ndarray | int) -> np.ndarray:
    """What stands at each place of its order.

    Args:
        places: int [N], each from 0 to its size - 1.
        sizes: int [N], or one for all.
        keys: uint64 [N], or one for all; an order for each key.

    Returns:
        int64 [N].
    """
    return _walk(places, sizes, keys, backwards=False)


def find(items: np.ndarray, sizes: np.ndarray | int, keys: np.ndarray | int) -> np.ndarray:
    """The place at which each item stands: the inverse of :func:`permute`."""
    return _walk(items, sizes, keys, backwards=True)


def _walk(values: np.ndarray, sizes: np.ndarray | int, keys: np.ndarray | int, *, backwards: bool) -> np.ndarray:
    current, size, key = np.broadcast_arrays(
        np.asarray(values).astype(np.uint64), np.asarray(sizes).astype(np.uint64), np.asarray(keys, dtype=np.uint64)
    )
    width = np.ceil(np.sqrt(size.astype(np.float64))).astype(np.uint64)
    height = (size + width - np.uint64(1)) // np.maximum(width, np.uint64(1))
    result = np.empty(current.shape, dtype=np.int64)
    rest = np.arange(current.size)
    current, size, key, width, height = (item.ravel() for item in (current, size, key, width, height))
    flat = result.ravel()
    while len(rest):
        current = _rounds(current, key, width, height, backwards=backwards)
        inside = current < size
        if inside.all():
            flat[rest] = current
            break
        flat[rest[inside]] = current[inside]
        outside = ~inside
        rest = rest[outside]
        current, size, key, width, height = (item[outside] for item in (current, size, key, width, height))
    return flat.reshape(result.shape)


def _rounds(
    values: np.ndarray, keys: np.ndarray, width: np.ndarray, height: np.ndarray, *, backwards: bool
) -> np.ndarray:
    left, right = np.divmod(values, height)
    numbers = range(2 * _NUM_ROUNDS)
    for number in reversed(numbers) if backwards else numbers:
        if number % 2:
            right = _shift(right, left, height, keys, number, backwards)
        else:
            left = _shift(left, right, width, keys, number, backwards)
    return left * height + right


def _shift(
    half: np.ndarray, other: np.ndarray, modulus: np.ndarray, keys: np.ndarray, number: int, backwards: bool
) -> np.ndarray:
    """``half`` plus or minus a number below ``modulus`` that ``other``, the key and the round decide."""
    with np.errstate(over="ignore"):
        hashed = mix(mix(other + keys) ^ (_GOLDEN * np.uint64(number + 1)))
        amount = ((hashed >> np.uint64(32)) * modulus) >> np.uint64(32)
        shifted = half + (modulus - amount if backwards else amount)
    return np.where(shifted >= modulus, shifted - modulus, shifted)
