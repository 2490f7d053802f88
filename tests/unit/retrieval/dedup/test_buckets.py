"""Buckets of signatures: how they are cut, and which rows of them are similar."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from megatron_grit.retrieval.dedup import buckets
from megatron_grit.retrieval.dedup.buckets import (
    FOUND_AT_THRESHOLD,
    Bands,
    Entries,
    band_keys,
    choose_bands,
    find_pairs,
)


def plain_pairs(keys: np.ndarray, table: np.ndarray, threshold: float, first_new: int, most: int) -> list[list[int]]:
    """Row after row, as the definition says; rows in the order of their numbers."""
    leaders: dict[int, list[int]] = {}
    pairs = []
    for row, key in enumerate(keys.tolist()):
        of_bucket = leaders.setdefault(key, [])
        like = [leader for leader in of_bucket if (table[leader] == table[row]).mean() >= threshold]
        if like:
            pairs += [[row, like[0]]] if row >= first_new else []
        elif len(of_bucket) < most:
            of_bucket.append(row)
    return pairs


def entries_of(keys: np.ndarray, random: np.random.Generator) -> Iterator[Entries]:
    """Sorted by key, cut anywhere."""
    order = np.argsort(keys, kind="stable")
    cuts = np.sort(random.integers(0, len(keys) + 1, random.integers(0, 6)))
    for rows in np.split(order, cuts):
        yield keys[rows], rows


@pytest.mark.parametrize("seed", range(40))
def test_pairs_are_those_of_a_plain_loop(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(seed)
    num_rows, most = int(random.integers(1, 120)), int(random.choice([1, 2, 32]))
    monkeypatch.setattr(buckets, "MAX_LEADERS", most)
    monkeypatch.setattr(buckets, "_ROWS_AT_ONCE", int(random.choice([1, 2, 3, 7, 50, 1000])))
    keys = random.integers(0, random.choice([1, 3, 40]), num_rows).astype(np.uint64)
    table = random.integers(0, 3, (num_rows, 6), dtype=np.uint32)
    first_new = int(random.choice([0, 0, num_rows // 2]))
    threshold = float(random.choice([0.3, 0.5, 0.8, 1.0]))
    found = find_pairs(entries_of(keys, random), lambda rows: table[rows], threshold, first_new=first_new)
    assert found.tolist() == plain_pairs(keys, table, threshold, first_new, most)


def test_a_bucket_of_unlike_rows_is_not_compared_all_with_all(monkeypatch: pytest.MonkeyPatch) -> None:
    num_rows, looked_at = 5000, []
    table = np.arange(num_rows, dtype=np.uint32)[:, None].repeat(4, axis=1)
    table[-1] = table[0]
    monkeypatch.setattr(buckets, "_ROWS_AT_ONCE", 1000)

    def signatures(rows: np.ndarray) -> np.ndarray:
        looked_at.append(len(rows))
        return table[rows]

    entries = [(np.zeros(num_rows, dtype=np.uint64), np.arange(num_rows))]
    assert find_pairs(entries, signatures, 0.5).tolist() == [[num_rows - 1, 0]]
    assert max(looked_at) <= 1000 + buckets.MAX_LEADERS and sum(looked_at) <= num_rows + 5 * buckets.MAX_LEADERS


@pytest.mark.parametrize("threshold", [0.05, 0.3, 0.5, 0.7, 0.8, 0.85, 0.9, 0.95, 0.99, 0.999, 1.0])
@pytest.mark.parametrize("num_columns", [16, 100, 128, 256])
def test_bands_find_what_is_at_the_threshold(threshold: float, num_columns: int) -> None:
    bands = choose_bands(threshold, num_columns)
    assert bands.count * bands.width <= num_columns
    wider = [Bands(num_columns // width, width) for width in range(bands.width + 1, num_columns + 1)]
    assert all(other.share_found(threshold) < FOUND_AT_THRESHOLD for other in wider)
    assert bands.share_found(threshold) >= FOUND_AT_THRESHOLD or bands == Bands(num_columns, 1)


def test_bands_of_common_settings() -> None:
    assert choose_bands(0.8, 128) == Bands(16, 8)
    assert choose_bands(1.0, 128) == Bands(1, 128)


def test_rows_have_one_key_where_their_columns_are_equal() -> None:
    random = np.random.default_rng(0)
    table = random.integers(0, 2, (6000, 14), dtype=np.uint32) * np.uint32(2**32 - 1)
    bands = Bands(3, 4)  # two columns are in none
    keys = band_keys(table, bands)
    assert keys.shape == (3, len(table)) and keys.dtype == np.uint64
    for band in range(3):
        columns = [tuple(row) for row in table[:, 4 * band : 4 * band + 4].tolist()]
        pairs = set(zip(columns, keys[band].tolist(), strict=True))
        assert len(pairs) == len(set(columns)) == len(np.unique(keys[band])) == 16
    assert (band_keys(table[4090:4100], bands) == keys[:, 4090:4100]).all()
    assert band_keys(table[:0], bands).shape == (3, 0)


def test_keys_are_spread_evenly() -> None:
    # Small numbers that differ in little, which a plain sum would put side by side.
    table = np.arange(40_000, dtype=np.uint32).reshape(-1, 4)
    keys = band_keys(table, Bands(2, 2))
    counts = np.bincount((keys[0] >> np.uint64(60)).astype(np.int64), minlength=16)
    assert abs(counts / len(table) - 1 / 16).max() < 0.01
