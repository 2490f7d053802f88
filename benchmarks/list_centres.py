"""Centres of an index's lists, by processes together against faiss alone, on embeddings of text; and what they cost.

(a) The mean squared distance to the nearest centre, of vectors that centres were trained on: by this package, by
    faiss with the same number of iterations, and by this package after one iteration, which should be found worse.
    Means of three seeds.
(b) CPU seconds, one thread: of comparing a channel of a vector with a centre; of adding a vector up; of putting a
    centre into the graph that finds it.

Example:
    python -m benchmarks.list_centres --data ../shared/data
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import harness
from benchmarks.preprocess import wiki_documents
from benchmarks.retrieval_quality import minilm_folder
from megatron_grit.inference.encoders.load import load_embedder
from megatron_grit.inference.encoders.protocol import EmbedderOptions
from megatron_grit.retrieval.index.faiss_index import VectorIndex
from megatron_grit.retrieval.index.kmeans import ITERATIONS, KMeans
from megatron_grit.retrieval.index.on_torch import nearest_centres
from megatron_grit.retrieval.work import Worker
from megatron_grit.store.blocks import BlockFolder

WITHIN, SEEDS = 0.01, (1, 2, 3)


def main() -> int:
    """Parse the command line and measure. Status 1 where centres are worse than faiss's by more than a hundredth."""
    parser = harness.parser(__doc__, data="wikitext2_valid.txt")
    parser.add_argument("--vectors", type=int, default=4000, help="that are embedded (default: 4000)")
    parser.add_argument("--lists", type=int, nargs="+", default=[16, 64, 100], help="numbers of centres")
    parser.add_argument(
        "--graph", type=int, nargs="+", default=[8192, 32768], help="centres of a graph of 128 channels"
    )
    options = parser.parse_args()
    return harness.run("list_centres", options, functools.partial(measure, options))


def measure(options: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], bool]:
    """(a) and (b), printed."""
    vectors, results, met = embeddings(options), [], True
    for num_lists in options.lists:
        found = {
            "ours": np.mean(
                [error(vectors, ours(folder / f"{num_lists}.{seed}", vectors, num_lists, seed)) for seed in SEEDS]
            ),
            "faiss": np.mean([error(vectors, by_faiss(vectors, num_lists, seed)) for seed in SEEDS]),
            "once": np.mean(
                [error(vectors, ours(folder / f"{num_lists}.{seed}.1", vectors, num_lists, seed, 1)) for seed in SEEDS]
            ),
        }
        ratio, control = found["ours"] / found["faiss"], found["once"] / found["faiss"]
        met &= bool(ratio <= 1 + WITHIN < control)
        print(
            f"{num_lists:6,} centres of {len(vectors):,} vectors: {found['ours']:.5f}, faiss {found['faiss']:.5f}: "
            f"{ratio:.4f} (at most {1 + WITHIN}); after one iteration {control:.4f}",
            flush=True,
        )
        results.append({"lists": num_lists, **{name: float(value) for name, value in found.items()}})
    costs = measure_costs(options.graph)
    for name, value in costs.items():
        print(f"{name}: {value:.3g} CPU s", flush=True)
    return {"quality": results, "costs": costs}, met


def embeddings(options: argparse.Namespace) -> np.ndarray:
    """Of pieces of text."""
    words = " ".join(wiki_documents(options.data, 40.0 * 12 * options.vectors, 1)).split()
    texts = [" ".join(words[start : start + 40]) for start in range(0, 40 * options.vectors, 40)]
    embedder = load_embedder(str(minilm_folder()), EmbedderOptions(precision="fp32", device="cpu"))
    return embedder.embed([text for text in texts if text])


def ours(folder: Path, vectors: np.ndarray, num_lists: int, seed: int, iterations: int = ITERATIONS) -> np.ndarray:
    """By one process; several give the same bits."""
    nearest = functools.partial(nearest_centres, metric="l2")
    means = KMeans(num_lists, len(vectors), False, seed, nearest, iterations)
    return means.run(vectors, Worker(), BlockFolder(folder, iterations, 1, {"task": "lists"}))


def by_faiss(vectors: np.ndarray, num_lists: int, seed: int) -> np.ndarray:
    """Of the vectors in another order, from which faiss then draws other first centres."""
    shuffled = vectors[np.random.default_rng(seed).permutation(len(vectors))]
    index = VectorIndex.train(f"IVF{num_lists},Flat", "l2", shuffled)
    return np.asarray(index.inner.quantizer.reconstruct_n(0, num_lists))


def error(vectors: np.ndarray, centres: np.ndarray) -> float:
    """Mean squared distance to the nearest centre, in double precision."""
    _, of = nearest_centres(vectors, centres, "l2")
    return float(((vectors.astype(np.float64) - centres[of]) ** 2).sum(axis=1).mean())


def measure_costs(graphs: list[int]) -> dict[str, float]:
    """(b)."""
    random, dim = np.random.default_rng(0), 128
    vectors, centres = (random.standard_normal((count, dim), dtype=np.float32) for count in (16_384, 65_536))
    costs = {"a channel of a vector with a centre": cpu(lambda: nearest_centres(vectors[:8192], centres, "l2"))}
    costs["a channel of a vector with a centre"] /= 8192 * len(centres) * dim
    means = KMeans(len(centres), len(vectors), False, 0, lambda rows, _: (np.zeros(len(rows)), np.zeros(len(rows))))
    of = random.integers(0, len(centres), len(vectors))
    costs["a vector of 128 channels added up"] = cpu(
        lambda: means._means(vectors, of, centres, 2.0**30, Worker(), 0)
    ) / len(vectors)
    for count in graphs:
        sample = random.standard_normal((count, dim), dtype=np.float32)
        index = VectorIndex.with_transforms(f"IVF{count}_HNSW32,Flat", "l2", sample)
        costs[f"a centre put into a graph of {count:,}"] = cpu(lambda: index.finish_training(sample, sample)) / count  # noqa: B023
    return costs


def cpu(function: Callable[[], object]) -> float:
    """CPU seconds of a call."""
    began = time.process_time()
    function()
    return time.process_time() - began


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
