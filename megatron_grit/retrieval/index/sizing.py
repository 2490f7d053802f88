"""What the codes of an index can find, known before it is filled, and what others would take."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from megatron_grit.errors import ConfigError
from megatron_grit.retrieval.index.factory import choose_factory, index_bytes
from megatron_grit.retrieval.index.faiss_index import VectorIndex, exact_search
from megatron_grit.retrieval.index.recall import RECALL_AT, recall_of, without_own

MOST_COMPARED = 20_000
"""Vectors of the sample that codes are tried on."""
NUM_TRIED = 500
"""Of them that the nearest are asked of."""


def larger_choices(factory: str, dim: int, num_vectors: int) -> Iterator[tuple[str, float]]:
    """What ``index: auto`` would take with more memory, as far as floats: factory strings and index_memory_gb that they
    need, the least first.

    Args:
        factory: what it takes now.
        dim: channels.
        num_vectors: of the whole database.
    """
    now, last = index_bytes(factory, dim, num_vectors), factory
    gigabytes = max(0.25, np.ceil(4 * now / 2**30) / 4)
    most = 8.0 * (dim + 8) * num_vectors / 2**30
    while gigabytes < most and not last.endswith("Flat"):
        try:
            chosen = choose_factory(num_vectors, dim, gigabytes * 2**30)
        except ConfigError:  # not even the shortest codes fit
            chosen = last
        if chosen != last and (size := index_bytes(chosen, dim, num_vectors)) > now:
            yield chosen, float(gigabytes)
            last, now = chosen, size
        gigabytes = max(gigabytes + 0.25, np.ceil(4 * 1.05 * gigabytes) / 4)


def recall_of_codes(index: VectorIndex, vectors_ND: np.ndarray) -> float | None:
    """Share of the exact nearest neighbors, within a sample, that are found by comparing all codes: what no search of
    the index exceeds. It falls as the database grows, for its chunks lie closer.

    Args:
        index: trained.
        vectors_ND: the sample; :data:`MOST_COMPARED` of it are taken, evenly, as it is in the order of the documents.

    Returns:
        None: a graph, whose vectors are not compared by codes alone, or too few vectors.
    """
    if index.is_graph or len(vectors_ND) <= 2 * RECALL_AT:
        return None
    count = min(len(vectors_ND), MOST_COMPARED)
    taken = np.arange(count) * len(vectors_ND) // count
    vectors = np.ascontiguousarray(vectors_ND[taken], dtype=np.float32)
    own = np.linspace(0, count - 1, min(NUM_TRIED, count), dtype=np.int64)
    decoded = index.inner.sa_decode(index.encode(vectors))
    queries = index.transformed(vectors[own])
    exact = exact_search(vectors[own], vectors, RECALL_AT + 1, index.metric)[1]
    found = exact_search(queries, decoded, RECALL_AT + 1, index.metric)[1]
    return float(recall_of(without_own(found, own, RECALL_AT), without_own(exact, own, RECALL_AT)).mean())


def too_coarse(index: VectorIndex, sample: np.ndarray, num_vectors: int, recall: float, *, is_auto: bool) -> str | None:
    """What to say of an index whose codes cannot reach the wanted recall, before it is filled; None where they may.

    Args:
        index: trained.
        sample: what it was trained on, float32 [N, D].
        num_vectors: of the whole database.
        recall: wanted.
        is_auto: whether its kind was chosen by memory.
    """
    best = recall_of_codes(index, sample)
    if best is None or best >= recall:
        return None
    size = index_bytes(index.factory, index.dim, num_vectors)
    count = min(len(sample), MOST_COMPARED)
    fewer = f", and fewer of {num_vectors:,}" if num_vectors > count else ""
    text = (
        f"index {index.factory} ({size / 2**30:.3g} GiB): of {count:,} chunks its codes find {best:.3f} of the nearest "
        f"where all are compared{fewer}; recall {recall} is out of reach"
    )
    choices = list(larger_choices(index.factory, index.dim, num_vectors))
    if not choices:
        return f"{text}; give an index with longer codes"
    wanted = ", ".join(f"{gigabytes:g} for {factory}" for factory, gigabytes in choices)
    how = "raise index_memory_gb" if is_auto else "set index to auto with index_memory_gb"
    return f"{text}; {how}: {wanted}"
