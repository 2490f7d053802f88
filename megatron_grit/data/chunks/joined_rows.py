"""The tables of a database's segments, read as one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


class JoinedRows:
    """Several mapped tables, one after the other, read like one array: by a row, a slice, an array or a mask of rows,
    and after it by a column or a slice of them."""

    def __init__(self, tables: Sequence[np.ndarray]) -> None:
        self._tables = list(tables)
        self._ends = np.cumsum([len(table) for table in tables])
        self._starts = self._ends - [len(table) for table in tables]
        self.shape = (int(self._ends[-1]), *tables[0].shape[1:])
        self.dtype = tables[0].dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> np.ndarray:
        index, *columns = index if isinstance(index, tuple) else (index,)
        if any(not isinstance(column, int | slice) for column in columns):
            raise IndexError("columns are a number or a slice")
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step == 1:
                bounds = [(max(start - first, 0), max(stop - first, 0)) for first in self._starts.tolist()]
                pairs = zip(self._tables, bounds, strict=True)
                return np.concatenate([table[first:last][(slice(None), *columns)] for table, (first, last) in pairs])
            index = np.arange(start, stop, step)
        ids = np.asarray(index)
        if ids.dtype == bool:
            if ids.shape != (len(self),):
                raise IndexError(f"a mask of shape {ids.shape} for {len(self)} chunks")
            ids = np.flatnonzero(ids)
        if ids.ndim == 0 and -len(self) <= ids < 0:
            ids = ids + len(self)
        if ids.size and not (0 <= ids.min() and ids.max() < len(self)):
            raise IndexError(f"chunks {ids.min()} to {ids.max()} of {len(self)}")
        which = np.searchsorted(self._ends, ids, side="right")
        out = np.empty((*ids.shape, *self.shape[1:]), dtype=self.dtype)
        for number, table in enumerate(self._tables):
            here = which == number
            out[here] = table[ids[here] - self._starts[number]]
        return np.asarray(out[(..., *columns)])
