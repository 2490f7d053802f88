"""A stream of segments as rows of equal shape, a window at a time.

Each window of the stream is packed by first-fit decreasing, together with what the window before it left over. Rows
that are nearly full are taken, in an order drawn for the window; the segments of the others wait for the next one, but
no longer than a few windows. Every segment comes exactly once.

Which segments a row holds is up to all windows before it, so rows are planned in order, in blocks of windows that are
kept in the index cache: a resumed run, and every other rank, reads them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_grit.data.order.permutation import derive_keys, permute
from megatron_grit.data.rows.packing import fill_rows
from megatron_grit.errors import DataError
from megatron_grit.store.cache import Arrays, cache_path, cached, load

_WINDOWS_OF_A_BLOCK = 32
_BLOCKS_KEPT = 4
_FULL = 0.998
"""Share of its tokens that a row needs to be taken at once."""
_PATIENCE, _LONGEST_WAIT = 2, 8
"""Windows after which a segment is packed before the others, and after which its row is taken, full or not. Without the
first the shortest segments, which come last, would be left over again and again."""

PIECE = np.dtype([("source", "<i4"), ("record", "<i8"), ("start", "<i4"), ("stop", "<i4"), ("age", "<i4")])
"""Tokens ``start`` to ``stop - 1`` of a record, and for how many windows it has waited."""


@dataclass(frozen=True, kw_only=True)
class _Block:
    number: int
    first_row: int
    bounds: np.ndarray
    """int64 [num_rows + 1]: pieces of row r of the block are bounds[r] to bounds[r + 1] - 1."""
    pieces: np.ndarray
    """PIECE, row after row."""
    carry: np.ndarray
    """PIECE: left over after the last window."""

    @property
    def stop_row(self) -> int:
        return self.first_row + len(self.bounds) - 1


class RowPlan:
    """Rows of a stream, by number.

    Args:
        read: the pieces of a range of the stream's slots, in their order: PIECE. An endless stream.
        tokens_per_row: tokens of a row; no piece is longer.
        window: slots of a window.
        key: uint64, for the order of a window's rows.
        folder: index cache.
        identity: all that the pieces depend on.
    """

    def __init__(
        self,
        read: Callable[[int, int], np.ndarray],
        tokens_per_row: int,
        window: int,
        key: np.uint64,
        folder: str,
        identity: Mapping[str, Any],
    ) -> None:
        self._read, self._tokens_per_row, self._window, self._key = read, tokens_per_row, window, key
        self._folder = folder
        self._identity = {
            "what": "row plan 1",
            "tokens_per_row": tokens_per_row,
            "window": window,
            "key": int(key),
            "rule": [_WINDOWS_OF_A_BLOCK, _FULL, _PATIENCE, _LONGEST_WAIT],
            **identity,
        }
        self._blocks: OrderedDict[int, _Block] = OrderedDict()

    def rows(self, start: int, stop: int) -> list[np.ndarray]:
        """Pieces of each row from ``start`` to ``stop - 1``: PIECE each."""
        found: list[np.ndarray] = []
        while start < stop:
            block = self._block_with(start)
            until = min(stop, block.stop_row)
            bounds = block.bounds[start - block.first_row : until - block.first_row + 1]
            found += [block.pieces[begin:end] for begin, end in zip(bounds[:-1], bounds[1:], strict=True)]
            start = until
        return found

    def counts(self, num_rows: int, num_sources: int) -> np.ndarray:
        """Pieces of each source in the first rows: int64 [num_sources]. Goes through all blocks up to there."""
        counts, row = np.zeros(num_sources, dtype=np.int64), 0
        while row < num_rows:
            block = self._block_with(row)
            row = min(num_rows, block.stop_row)
            taken = block.pieces["source"][: block.bounds[row - block.first_row]]
            counts += np.bincount(taken, minlength=num_sources)
        return counts

    def _block_with(self, row: int) -> _Block:
        for block in self._blocks.values():
            if block.first_row <= row < block.stop_row:
                return block
        nearest = self._nearest_block(row)
        while nearest is None or nearest.stop_row <= row:
            nearest = self._next_block(nearest)
        return nearest

    def _nearest_block(self, row: int) -> _Block | None:
        """The last block that is known, here or in the cache, and does not begin after ``row``."""
        best = max((block for block in self._blocks.values() if block.first_row <= row), key=_number, default=None)
        low, step = (0 if best is None else best.number + 1), 1
        while cache_path(self._folder, "rows", self._key_of(low + step - 1)).exists():
            step *= 2
        high = low + step - 1  # block ``high`` is not in the cache
        while low < high:
            middle = (low + high) // 2
            arrays = load(cache_path(self._folder, "rows", self._key_of(middle)), self._key_of(middle))
            if arrays is None or int(arrays["first_row"][0]) > row:
                high = middle
            else:
                best, low = self._keep(middle, arrays), middle + 1
        return best

    def _next_block(self, before: _Block | None) -> _Block:
        number = 0 if before is None else before.number + 1
        return self._keep(number, cached(self._folder, "rows", self._key_of(number), lambda: self._plan(before)))

    def _keep(self, number: int, arrays: Arrays) -> _Block:
        block = _Block(
            number=number,
            first_row=int(arrays["first_row"][0]),
            bounds=arrays["bounds"],
            pieces=arrays["pieces"].view(PIECE),
            carry=arrays["carry"].view(PIECE),
        )
        self._blocks[number] = block
        while len(self._blocks) > _BLOCKS_KEPT:
            self._blocks.popitem(last=False)
        return block

    def _key_of(self, number: int) -> dict[str, Any]:
        return {**self._identity, "block": number}

    def _plan(self, before: _Block | None) -> Arrays:
        """The block after ``before``."""
        number = 0 if before is None else before.number + 1
        carry = np.empty(0, dtype=PIECE) if before is None else before.carry
        rows: list[np.ndarray] = []
        first = number * _WINDOWS_OF_A_BLOCK
        for window in range(first, first + _WINDOWS_OF_A_BLOCK):
            taken, carry = self._plan_window(window, carry)
            rows += taken
        if not rows:
            raise DataError(
                f"{_WINDOWS_OF_A_BLOCK * self._window} records in a row have nothing to train on; raise "
                "data.tokens_per_row, or set data.over_long to split"
            )
        lengths = np.array([len(row) for row in rows], dtype=np.int64)
        pieces = np.concatenate([*rows, np.empty(0, dtype=PIECE)])
        return {
            "first_row": np.array([0 if before is None else before.stop_row], dtype=np.int64),
            "bounds": np.concatenate(([0], np.cumsum(lengths))).astype(np.int64),
            "pieces": pieces.view(np.uint8),
            "carry": carry.view(np.uint8),
        }

    def _plan_window(self, window: int, carry: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
        """The rows that a window fills, and what is left over."""
        pieces = np.concatenate([carry, self._read(window * self._window, (window + 1) * self._window)])
        lengths = (pieces["stop"] - pieces["start"]).astype(np.int64)
        taken: list[np.ndarray] = []
        left: list[np.ndarray] = []
        for row in fill_rows(lengths, self._tokens_per_row, pieces["age"] >= _PATIENCE):
            full = lengths[row].sum() >= _FULL * self._tokens_per_row
            (taken if full or (pieces["age"][row] >= _LONGEST_WAIT).any() else left).append(row)
        order = permute(np.arange(len(taken)), max(1, len(taken)), derive_keys(self._key, window)).tolist()
        rest = pieces[np.sort(np.concatenate([*left, np.empty(0, dtype=np.int64)]))]
        rest["age"] += 1
        return [pieces[taken[index]] for index in order], rest


def _number(block: _Block) -> int:
    return block.number
