"""Rows of a stream: every piece once, nearly full, the same from a cache and from any row on."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_grit.data.rows import row_plan
from megatron_grit.data.rows.row_plan import PIECE, RowPlan
from megatron_grit.errors import DataError
from megatron_grit.store.cache import cache_path

CAPACITY = 100


class Stream:
    """Slot t holds a record of a length that a rule gives; counts what is read."""

    def __init__(self, shortest: int = 1, longest: int = CAPACITY) -> None:
        self.shortest, self.longest, self.reads = shortest, longest, 0

    def __call__(self, start: int, stop: int) -> np.ndarray:
        self.reads += 1
        pieces = np.zeros(stop - start, dtype=PIECE)
        pieces["record"] = np.arange(start, stop)
        spread = self.longest - self.shortest + 1
        pieces["stop"] = self.shortest + (pieces["record"] * 7919) % 104729 % spread
        return pieces


def plan(stream: Stream, folder: Path, window: int = 32, seed: int = 1) -> RowPlan:
    return RowPlan(stream, CAPACITY, window, np.uint64(seed), str(folder), {"shortest": stream.shortest})


def as_tuples(rows: list[np.ndarray]) -> list[list[tuple]]:
    return [row.tolist() for row in rows]


def lengths(row: np.ndarray) -> int:
    return int((row["stop"] - row["start"]).sum())


@pytest.mark.parametrize(("shortest", "longest"), [(1, CAPACITY), (1, 30), (60, 80), (CAPACITY, CAPACITY)])
def test_every_piece_once_and_none_waits_long(tmp_path: Path, shortest: int, longest: int) -> None:
    stream, window = Stream(shortest, longest), 32
    rows = plan(stream, tmp_path, window).rows(0, 600)
    assert all(0 < lengths(row) <= CAPACITY for row in rows)
    seen = Counter(record for row in rows for record in row["record"].tolist())
    assert set(seen.values()) == {1}
    # All but the last windows are through: what a row holds has waited at most so many windows.
    done = max(seen) - (row_plan._LONGEST_WAIT + 2) * window
    assert done > 0 and all(record in seen for record in range(done))
    assert max(int(row["age"].max()) for row in rows) <= row_plan._LONGEST_WAIT


def test_rows_are_full(tmp_path: Path) -> None:
    rows = plan(Stream(1, 40), tmp_path, window=256).rows(0, 1000)
    assert np.mean([lengths(row) for row in rows]) > 0.99 * CAPACITY


def test_long_and_short_rows_are_mixed(tmp_path: Path) -> None:
    """First-fit decreasing makes the rows of long segments first; their order is drawn."""
    rows = plan(Stream(1, CAPACITY), tmp_path, window=256).rows(0, 100)
    counts = np.array([len(row) for row in rows])
    assert abs(np.corrcoef(counts, np.arange(len(counts)))[0, 1]) < 0.3
    other = plan(Stream(1, CAPACITY), tmp_path, window=256, seed=2).rows(0, 100)
    assert as_tuples(other) != as_tuples(rows)


@given(starts=st.lists(st.integers(0, 1500), min_size=1, max_size=3))
@settings(max_examples=10)
def test_any_row_from_anywhere(tmp_path_factory: pytest.TempPathFactory, starts: list[int]) -> None:
    reference = self_reference(tmp_path_factory)
    folder = tmp_path_factory.mktemp("any")
    running = plan(Stream(), folder)
    for start in starts:
        expected = reference[start : start + 5]
        assert as_tuples(running.rows(start, start + 5)) == expected  # forwards and backwards
        assert as_tuples(plan(Stream(), folder).rows(start, start + 5)) == expected  # with what the cache has by now


_REFERENCE: list[list[list[tuple]]] = []


def self_reference(factory: pytest.TempPathFactory) -> list[list[tuple]]:
    if not _REFERENCE:
        _REFERENCE.append(as_tuples(plan(Stream(), factory.mktemp("reference")).rows(0, 1510)))
    return _REFERENCE[0]


def test_a_run_that_goes_on_reads_its_plan(tmp_path: Path) -> None:
    first, again, fresh = Stream(), Stream(), Stream()
    expected = as_tuples(plan(first, tmp_path).rows(3000, 3010))
    assert first.reads > 100
    assert as_tuples(plan(again, tmp_path).rows(3000, 3010)) == expected
    assert again.reads == 0
    for path in sorted(tmp_path.glob("rows-*.cache")):  # all damaged: planned anew
        path.write_bytes(path.read_bytes()[:-1])
    assert as_tuples(plan(fresh, tmp_path).rows(3000, 3010)) == expected
    assert fresh.reads == first.reads


def test_a_damaged_block_is_planned_again(tmp_path: Path) -> None:
    stream = Stream()
    whole = plan(stream, tmp_path)
    expected = as_tuples(whole.rows(0, 3000))
    middle = cache_path(tmp_path, "rows", whole._key_of(1))
    content = bytearray(middle.read_bytes())
    content[-5] ^= 1
    middle.write_bytes(content)
    assert as_tuples(plan(Stream(), tmp_path).rows(0, 3000)) == expected


def test_counts(tmp_path: Path) -> None:
    def read(start: int, stop: int) -> np.ndarray:
        pieces = Stream(1, 40)(start, stop)
        pieces["source"] = pieces["record"] % 3 == 0
        return pieces

    rows = RowPlan(read, CAPACITY, 32, np.uint64(1), str(tmp_path), {})
    for num_rows in (0, 1, 700):
        pieces = rows.rows(0, num_rows)
        expected = np.bincount(np.concatenate([*(row["source"] for row in pieces), np.empty(0, int)]), minlength=2)
        assert rows.counts(num_rows, 2).tolist() == expected.tolist()


def test_nothing_to_train_on(tmp_path: Path) -> None:
    rows = RowPlan(lambda start, stop: np.zeros(0, dtype=PIECE), CAPACITY, 8, np.uint64(1), str(tmp_path), {})
    with pytest.raises(DataError, match="256 records in a row have nothing to train on"):
        rows.rows(0, 1)
