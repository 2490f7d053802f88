"""Measures of rankings as trec_eval computes them, and with it pytrec_eval, BEIR and mteb.

Shape suffix legend: Q = queries, K = ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

CUTOFFS = (1, 3, 5, 10, 100, 1000)
"""Ranks at which BEIR reports."""
MEASURES = ("ndcg", "map", "recall", "precision", "mrr")


def trec_order(scores: np.ndarray, id_places: np.ndarray) -> np.ndarray:
    """The order in which trec_eval ranks documents: higher scores first, of equal ones the larger id first.

    Args:
        scores: [K] in any order. Compared in fp32, as trec_eval holds them.
        id_places: [K] place of each document's id among all ids in lexical order.

    Returns:
        int64 [K].
    """
    return np.lexsort((-id_places, -scores.astype(np.float32)))


def measure(
    rankings: Sequence[np.ndarray], judgements: Sequence[Mapping[int, int]], cutoffs: Sequence[int] = CUTOFFS
) -> dict[str, np.ndarray]:
    """Measures of each query.

    nDCG has the grade as gain and 1 / log2(rank + 1) as discount; all others count a grade above 0 as relevant. MAP
    divides by the number of relevant documents, whatever the cutoff. A query without a relevant document has 0.

    Args:
        rankings: of each query its documents, best first, without repeats.
        judgements: of each query the grades of its judged documents.
        cutoffs: only so many documents of each ranking count.

    Returns:
        float64 [Q] by name: ``ndcg_at_10``, ``map_at_10``, ``recall_at_10``, ``precision_at_10``, ``mrr_at_10``.

    Source: trec_eval 9 (ndcg_cut, map_cut, recall, P, recip_rank of what the cutoff leaves).
    """
    found = {f"{name}_at_{k}": np.zeros(len(rankings)) for name in MEASURES for k in cutoffs}
    deepest = max(cutoffs)
    discounts = 1 / np.log2(np.arange(deepest) + 2)
    for query, (ranking, grades) in enumerate(zip(rankings, judgements, strict=True)):
        ideal = np.sort([float(grade) for grade in grades.values() if grade > 0])[::-1]
        if not len(ideal):
            continue
        gains = np.array([max(0, grades.get(document, 0)) for document in ranking[:deepest].tolist()], dtype=float)
        hits = gains > 0
        precision = np.cumsum(hits) / (np.arange(len(hits)) + 1)
        first = int(hits.argmax()) if hits.any() else deepest
        for k in cutoffs:
            best = float(ideal[:k] @ discounts[: len(ideal[:k])])
            found[f"ndcg_at_{k}"][query] = gains[:k] @ discounts[: len(gains[:k])] / best
            found[f"map_at_{k}"][query] = precision[:k][hits[:k]].sum() / len(ideal)
            found[f"recall_at_{k}"][query] = hits[:k].sum() / len(ideal)
            found[f"precision_at_{k}"][query] = hits[:k].sum() / k
            found[f"mrr_at_{k}"][query] = 1 / (first + 1) if first < k else 0
    return found
