"""Work on rows in threads, so that the result does not depend on how many there are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np

ROWS_OF_PART = 4096
"""Rows that one thread works on."""
T = TypeVar("T")


def in_parts(faiss: Any, function: Callable[[np.ndarray], T], vectors: np.ndarray) -> list[T]:
    """``function`` of runs of rows of one length, a thread for each. A matrix product that itself uses several threads
    has other last bits for each number of them.

    Args:
        faiss: the module.
        function: of float32 [n, D].
        vectors: float32 [N, D].
    """
    parts = [vectors[start : start + ROWS_OF_PART] for start in range(0, max(len(vectors), 1), ROWS_OF_PART)]

    def of_part(part: np.ndarray) -> T:
        with num_threads(faiss, 1):
            return function(part)

    with ThreadPoolExecutor(max(1, faiss.omp_get_max_threads())) as pool:
        return list(pool.map(of_part, parts))


@contextmanager
def num_threads(faiss: Any, count: int | None) -> Iterator[None]:
    """Within it faiss uses so many threads. None: as many as it did."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(before if count is None else count)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)
