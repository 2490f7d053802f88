"""Scores that do not depend on what else is compared."""

from __future__ import annotations

from typing import Any

import numpy as np


def scored_by_pairs(faiss: Any, flat: Any, queries_ND: np.ndarray, ids_NK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What an exact search found, each pair's score computed by itself, in the order of these.

    Those of a comparison of all come from a matrix product, whose last bits depend on what else is compared: equal
    vectors would differ, and be found in another order in an index of another size.

    Args:
        faiss: the module.
        flat: its IndexFlat.
        queries_ND: float32, contiguous.
        ids_NK: int64, contiguous, of the index, -1 for none.

    Returns:
        Scores, float32 [N, K], and ids, int64 [N, K], the best first, of equal scores the smaller id.
    """
    scores = np.empty(ids_NK.shape, dtype=np.float32)
    queries, found, ids = (faiss.swig_ptr(array) for array in (queries_ND, scores, ids_NK))
    flat.compute_distance_subset(len(queries_ND), queries, ids_NK.shape[1], found, ids)
    keys = np.where(ids_NK < 0, np.inf, scores if flat.metric_type == faiss.METRIC_L2 else -scores)
    rows = np.flatnonzero(~(keys[:, 1:] > keys[:, :-1]).all(axis=1))  # the others are in order
    order = np.lexsort((ids_NK[rows], keys[rows]), axis=1)
    scores[rows], ids_NK[rows] = np.take_along_axis(scores[rows], order, 1), np.take_along_axis(ids_NK[rows], order, 1)
    return scores, ids_NK
