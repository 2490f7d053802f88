"""What an index takes and what its codes can find, beside the index itself."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("faiss")

from megatron_grit.retrieval.index.factory import choose_factory, index_bytes  # noqa: E402
from megatron_grit.retrieval.index.faiss_index import VectorIndex, exact_search  # noqa: E402
from megatron_grit.retrieval.index.recall import recall_of, without_own  # noqa: E402
from megatron_grit.retrieval.index.sizing import (  # noqa: E402
    larger_choices,
    recall_of_codes,
    too_coarse,
)

DIM = 32


def vectors_of(count: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((count, DIM)).astype(np.float32)


@pytest.mark.parametrize("metric", ["l2", "inner_product"])
@pytest.mark.parametrize("factory", ["Flat", "SQ8", "OPQ4_16,IVF8,PQ4", "IVF8,PQ4x4"])
def test_the_recall_of_codes_is_that_of_a_search_of_all(factory: str, metric: str) -> None:
    vectors = vectors_of(3000)
    index = VectorIndex.train(factory, metric, vectors)
    found = recall_of_codes(index, vectors)
    index.add_codes(index.encode(vectors), np.arange(3000))
    index.set_search(8, None)
    own = np.linspace(0, 2999, 500, dtype=np.int64)
    exact = without_own(exact_search(vectors[own], vectors, 11, metric)[1], own, 10)
    wanted = recall_of(without_own(index.search(vectors[own], 11)[1], own, 10), exact).mean()
    assert found == pytest.approx(wanted, abs=0.01)


def test_coarse_codes_are_told_with_what_would_do() -> None:
    vectors = vectors_of(3000)
    index = VectorIndex.train("OPQ4_16,IVF16,PQ4", "l2", vectors)
    warning = too_coarse(index, vectors, 390_000_000, 0.95, is_auto=True)
    best = recall_of_codes(index, vectors)
    assert warning is not None and best is not None and f"of 3,000 chunks its codes find {best:.3f}" in warning
    assert "and fewer of 390,000,000; recall 0.95 is out of reach; raise index_memory_gb: " in warning
    assert too_coarse(VectorIndex.train("IVF16,Flat", "l2", vectors), vectors, 10**6, 0.95, is_auto=True) is None


def test_larger_choices_are_what_auto_takes_with_that_memory() -> None:
    count, dim = 390_000_000, 384
    first = choose_factory(count, dim, 16 * 2**30)
    choices = list(larger_choices(first, dim, count))
    assert first.endswith("PQ24") and [factory.rpartition(",")[2] for factory, _ in choices] == [
        *(f"PQ{size}" for size in (32, 48, 64, 96, 128, 192, 256)), "SQ8", "Flat"
    ]  # fmt: skip
    for factory, gigabytes in choices:
        assert choose_factory(count, dim, gigabytes * 2**30) == factory
        assert index_bytes(factory, dim, count) <= gigabytes * 2**30
