"""Packing: every segment once, within the budget, in as few and as equal rows as the rule gives."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_grit.data.rows.packing import _fill_empty_rows, pack
from megatron_grit.errors import ConfigError, DataError

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=60)


@given(lengths=LENGTHS, tokens_per_row=st.integers(40, 90), multiple=st.integers(1, 6))
def test_rows_hold_every_segment_once(lengths: list[int], tokens_per_row: int, multiple: int) -> None:
    lengths = lengths * multiple  # so that there are enough to fill the rows
    rows = pack(np.array(lengths), tokens_per_row, multiple)
    assert sorted(index for row in rows for index in row.tolist()) == list(range(len(lengths)))
    assert all(len(row) for row in rows)
    assert all(np.array(lengths)[row].sum() <= tokens_per_row for row in rows)
    assert len(rows) % multiple == 0
    assert all(row.tolist() == sorted(row.tolist()) for row in rows)


def first_fit_decreasing(lengths: list[int], tokens_per_row: int) -> int:
    """Rows of first-fit decreasing, written the plain way."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        for row, room in enumerate(rooms):
            if room >= length:
                rooms[row] -= length
                break
        else:
            rooms.append(tokens_per_row - length)
    return len(rooms)


@given(lengths=LENGTHS, tokens_per_row=st.integers(40, 90), multiple=st.integers(1, 4))
def test_number_of_rows_is_that_of_first_fit_decreasing(lengths: list[int], tokens_per_row: int, multiple: int) -> None:
    num_rows = -(-first_fit_decreasing(lengths, tokens_per_row) // multiple) * multiple
    if num_rows > len(lengths):
        with pytest.raises(ConfigError, match=f"{len(lengths)} segments cannot fill {num_rows} rows"):
            pack(np.array(lengths), tokens_per_row, multiple)
    else:
        assert len(pack(np.array(lengths), tokens_per_row, multiple)) == num_rows


def test_rows_are_nearly_equal() -> None:
    lengths = np.random.default_rng(0).integers(10, 500, size=400)
    rows = pack(lengths, 2048, 4)
    sums = [lengths[row].sum() for row in rows]
    assert max(sums) - min(sums) <= 0.03 * max(sums)
    assert len(rows) == math.ceil(lengths.sum() / 2048 / 4) * 4


def test_falls_back_where_equal_rows_overflow() -> None:
    lengths = np.array([6, 6, 4, 4, 4])  # the emptiest row first: 6 + 4 + 4 = 14, more than 12
    assert [row.tolist() for row in pack(lengths, 12)] == [[0, 1], [2, 3, 4]]


def test_fallback_fills_further_rows() -> None:
    rows = _fill_empty_rows([[0, 1], [2, 3, 4]], np.array([6, 6, 4, 4, 4]), 4)
    assert rows == [[1], [3, 4], [0], [2]]


def test_ties_go_by_index_and_the_result_repeats() -> None:
    rows = pack(np.full(8, 10), 40, 2)
    assert [row.tolist() for row in rows] == [[0, 2, 4, 6], [1, 3, 5, 7]]


def test_errors() -> None:
    with pytest.raises(DataError, match="segment 1 has 41 tokens, more than tokens_per_row 40"):
        pack(np.array([3, 41]), 40)
    with pytest.raises(ConfigError, match="3 segments cannot fill 4 rows"):
        pack(np.array([3, 3, 3]), 40, 4)
    assert pack(np.array([], dtype=np.int64), 40, 4) == []


def test_six_thousand_segments_are_quick() -> None:
    lengths = np.random.default_rng(1).integers(8, 600, size=6000)
    pack(lengths[:100], 2048)
    fastest = min(_seconds(lengths) for _ in range(3))
    assert fastest < 0.25, f"{fastest:.3f} s"


def _seconds(lengths: np.ndarray) -> float:
    start = time.process_time()
    pack(lengths, 2048, 8)
    return time.process_time() - start
