"""Where the chunks of a document are: those of one document follow each other in the table that they came in."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_grit.data.chunks.chunk_db import DATASET, DOCUMENT
from megatron_grit.data.chunks.versions import document_keys


def document_ranges(tables: Sequence[np.ndarray], keys: np.ndarray) -> np.ndarray:
    """Ids of the chunks of documents: a range in each of the tables that a version is made of.

    Reads about 60 rows for a document and table, whatever the size.

    Args:
        tables: rows of chunks, uint32 [num_chunks, 5], in the order of dataset and document; their ids go on from one
            table to the next.
        keys: of the documents, uint64 [n], of :func:`document_keys`.

    Returns:
        int64 [n, tables, 2]: first id and one after the last; both the same where the table has no chunk of it.
    """
    out, start = np.empty((len(keys), len(tables), 2), dtype=np.int64), 0
    for number, rows in enumerate(tables):
        for side in range(2):  # the key after a document's last chunk is above it
            out[:, number, side] = start + _first_from(rows, keys + np.uint64(side))
        start += len(rows)
    return out


def _first_from(rows: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Place of the first row whose key is not below each of ``keys``; all rows where there is none."""
    low, high = np.zeros(len(keys), dtype=np.int64), np.full(len(keys), len(rows), dtype=np.int64)
    while len(pending := np.flatnonzero(low < high)):
        middle = (low[pending] + high[pending]) // 2
        there = rows[middle]
        below = document_keys(there[:, DATASET], there[:, DOCUMENT]) < keys[pending]
        low[pending[below]] = middle[below] + 1
        high[pending[~below]] = middle[~below]
    return low
