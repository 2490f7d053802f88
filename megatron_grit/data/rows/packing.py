"""Segments into rows of a token budget.

:func:`pack` takes what a step has: first-fit decreasing finds how few rows will do, and the segments are then spread
over that many by longest processing time, since a step pays for its longest row: rows come out nearly equal.
:func:`fill_rows` takes a window of a stream and fills as many rows to the brim as it can; what is left over is for the
next window. Ties go by index, so that every process finds the same rows.
"""

from __future__ import annotations

import heapq

import numpy as np

from megatron_grit.errors import ConfigError, DataError


def pack(lengths: np.ndarray, tokens_per_row: int, num_rows_multiple: int = 1) -> list[np.ndarray]:
    """Assign segments to rows.

    Args:
        lengths: int [num_segments], tokens of each segment, all positive.
        tokens_per_row: no row holds more tokens.
        num_rows_multiple: the number of rows is rounded up to a multiple of this.

    Returns:
        For each row the indices of its segments, ascending: int64. Every segment is in one row, no row is empty.

    Raises:
        DataError: a segment longer than ``tokens_per_row``.
        ConfigError: fewer segments than rows.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if len(lengths) == 0:
        return []
    longest = int(lengths.argmax())
    if lengths[longest] > tokens_per_row:
        raise DataError(f"segment {longest} has {lengths[longest]} tokens, more than tokens_per_row {tokens_per_row}")
    order = np.argsort(-lengths, kind="stable")
    fitted = _first_fit_decreasing(lengths, order, tokens_per_row)
    num_rows = -(-len(fitted) // num_rows_multiple) * num_rows_multiple
    if len(lengths) < num_rows:
        raise ConfigError(
            f"{len(lengths)} segments cannot fill {num_rows} rows (data.num_rows_multiple or the data parallel size is "
            f"{num_rows_multiple}); make the batch larger"
        )
    rows = _spread(lengths, order, tokens_per_row, num_rows)
    if rows is None:
        rows = _fill_empty_rows(fitted, lengths, num_rows)
    return [np.sort(np.array(row, dtype=np.int64)) for row in rows]


def fill_rows(lengths: np.ndarray, tokens_per_row: int, first: np.ndarray) -> list[np.ndarray]:
    """Rows of first-fit decreasing, some segments before all others.

    Args:
        lengths: int [num_segments], tokens of each segment, positive and at most ``tokens_per_row``.
        tokens_per_row: no row holds more tokens.
        first: bool [num_segments], those that are placed first.

    Returns:
        For each row the indices of its segments, ascending: int64.
    """
    order = np.lexsort((-lengths, ~first))
    rows = _first_fit_decreasing(lengths, order, tokens_per_row) if len(lengths) else []
    return [np.sort(np.array(row, dtype=np.int64)) for row in rows]


def _first_fit_decreasing(lengths: np.ndarray, order: np.ndarray, tokens_per_row: int) -> list[list[int]]:
    """Each segment, in ``order``, into the first row that has room for it."""
    rows: list[list[int]] = []
    room = np.empty(len(order), dtype=np.int64)
    shortest = int(lengths.min())
    first = 0  # rows before this one have no room for anything
    for segment, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        fits = room[first : len(rows)] >= length
        row = first + int(fits.argmax()) if len(fits) else len(rows)
        if row == len(rows) or room[row] < length:
            row = len(rows)
            rows.append([])
            room[row] = tokens_per_row
        rows[row].append(segment)
        room[row] -= length
        while first < len(rows) and room[first] < shortest:
            first += 1
    return rows


def _spread(lengths: np.ndarray, order: np.ndarray, tokens_per_row: int, num_rows: int) -> list[list[int]] | None:
    """Each segment, longest first, into the emptiest row; None where that row has no room."""
    rows: list[list[int]] = [[] for _ in range(num_rows)]
    heap = [(0, row) for row in range(num_rows)]
    for segment, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        used, row = heap[0]
        if used + length > tokens_per_row:
            return None
        rows[row].append(segment)
        heapq.heapreplace(heap, (used + length, row))
    return rows


def _fill_empty_rows(rows: list[list[int]], lengths: np.ndarray, num_rows: int) -> list[list[int]]:
    """``rows`` and further ones up to ``num_rows``, each given the longest segment of the fullest row that has two."""
    rows = [list(row) for row in rows]
    while len(rows) < num_rows:
        used = [int(lengths[row].sum()) if len(row) > 1 else 0 for row in rows]
        fullest = rows[used.index(max(used))]
        moved = max(fullest, key=lambda segment: (lengths[segment], -segment))
        fullest.remove(moved)
        rows.append([moved])
    return rows
