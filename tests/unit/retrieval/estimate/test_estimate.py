"""What a dry run says that a build takes, against what it took."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_grit.config.database.schema import RetroDbConfig
from megatron_grit.data.chunks.chunk_db import ChunkDb
from megatron_grit.retrieval.database.vectors import embed_chunks, open_vectors
from megatron_grit.retrieval.estimate import lines, rates
from megatron_grit.retrieval.estimate.lines import estimate_build, lines_of
from megatron_grit.retrieval.estimate.rates import Rates, Spent
from megatron_grit.retrieval.estimate.stages import Estimate, Sizes
from megatron_grit.retrieval.index.factory import MOST_BYTES, index_bytes, num_training_vectors
from megatron_grit.retrieval.index.faiss_index import VectorIndex
from megatron_grit.retrieval.index.manifest import IndexManifest
from megatron_grit.retrieval.stages import run as stages
from megatron_grit.retrieval.stages.preparation import Preparation
from megatron_grit.retrieval.stages.query_neighbors import query_neighbors
from megatron_grit.retrieval.work import Worker
from tests.unit.retrieval.databases import (
    WordEmbedder,
    build,
    make_project,
    make_texts,
    tokenizer_of,
    write_documents,
)

TASKS = ["db-build", "embed", "index-train", "index-add", "query-neighbors"]


def bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_sizes_are_those_of_the_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks, places and disk of a corpus of which a part was looked at. Nothing is written beside it."""
    monkeypatch.setattr(rates, "_SAMPLES", (1 << 11, 1 << 13))
    prefix = write_documents(tmp_path / "corpus", make_texts(1200, seed=2), tokenizer_of(tmp_path))
    settings = {"block_size": 5000, "doc_block_size": 500, "num_neighbors_query": 40, "duplicates": "keep"}
    project = make_project(tmp_path / "db", [prefix], tmp_path, **settings)
    before = sorted(tmp_path.iterdir())
    embedder = WordEmbedder(64)
    estimate = estimate_build(project, embedder, TASKS, 1)
    assert sorted(tmp_path.iterdir()) == before, "an estimate wrote something"
    build(project, embedder, query=False)
    embed_chunks(open_vectors(project, Worker(), embedder), Worker())
    query_neighbors(project, Worker(), embedder)
    assert estimate.sizes.num_chunks == pytest.approx(len(ChunkDb(project)), rel=0.05)
    for task, folder in (
        ("db-build", "db"),
        ("embed", "embeddings"),
        ("index-add", "index"),
        ("query-neighbors", "query"),
    ):
        cost = estimate.of(task)
        assert cost is not None and cost.disk == pytest.approx(bytes_in(project.folder / folder), rel=0.2), task
        assert cost.memory > 10**7 and 0 < cost.spent.cpu < 60, task
    assert estimate.of("tombstone") is None
    # Twice as many chunks: twice as long to embed, and four times to compare all with all.
    twice = replace(estimate.sizes, num_chunks=2 * estimate.sizes.num_chunks, num_places=2 * estimate.sizes.num_places)
    larger = Estimate(project.config, twice, estimate.rates)
    costs = [[each.of(task) for task in ("embed", "query-neighbors")] for each in (estimate, larger)]
    assert costs[1][0].spent.cpu == pytest.approx(2 * costs[0][0].spent.cpu)
    assert 2 < costs[1][1].spent.cpu / costs[0][1].spent.cpu < 4


@pytest.mark.parametrize(("num_train", "measured"), [(100, 300), (900, 900), (5000, 2000)])
def test_codes_are_learnt_from_as_many_vectors_as_they_will_be(
    monkeypatch: pytest.MonkeyPatch, num_train: int, measured: int
) -> None:
    """The time of a vector is another one in small samples."""
    monkeypatch.setattr(rates, "_VECTORS", 300)
    monkeypatch.setattr(rates, "_QUERIES", 16)
    monkeypatch.setattr(rates, "_LEARNT_FROM", 2000)
    trained, train = [], VectorIndex.train
    monkeypatch.setattr(VectorIndex, "train", lambda *given: trained.append(len(given[2])) or train(*given))
    known = Rates(chunks_per_token=0, places_per_token=0, documents_per_token=0, text_bytes=200)
    vectors = rates.vectors_around(np.random.default_rng(0).standard_normal((50, 8), dtype=np.float32), num_train)
    rates.measure_vectors(known, vectors, vectors[:300], "IVF16,PQ4x4", RetroDbConfig(), 1600)
    assert trained == [300, measured] and known.cluster.cpu > 0
    assert known.scan.cpu + known.ask.cpu > 0


@pytest.mark.parametrize(("num_chunks", "lists", "nprobes"), [(160, 30, {2, 8}), (10**6, 16, {2, 8})])
def test_lists_are_as_long_as_they_will_be(
    monkeypatch: pytest.MonkeyPatch, num_chunks: int, lists: int, nprobes: set[int]
) -> None:
    """A vector of a short list costs more than one of a long one, so as many lists of that length are visited."""
    monkeypatch.setattr(rates, "_VECTORS", 300)
    monkeypatch.setattr(rates, "_QUERIES", 16)
    monkeypatch.setattr(rates, "_REPEATS", 1)
    factories, train = [], VectorIndex.train
    monkeypatch.setattr(VectorIndex, "train", lambda *given: factories.append(given[0]) or train(*given))
    visited, search = set(), VectorIndex.set_search
    monkeypatch.setattr(VectorIndex, "set_search", lambda self, *n: visited.add(n[0]) or search(self, *n))
    known = Rates(chunks_per_token=0, places_per_token=0, documents_per_token=0, text_bytes=200)
    vectors = np.random.default_rng(0).standard_normal((300, 8), dtype=np.float32)
    rates.measure_vectors(known, vectors, vectors, "IVF16,SQ8", RetroDbConfig(nprobe=8), num_chunks)
    assert factories[-1] == f"IVF{lists},SQ8" and visited == nprobes


@pytest.mark.parametrize(
    ("factory", "dim", "number"),
    [("Flat", 128, 10_240), ("IVF1024,PQ32", 128, 40_960), ("IVF1024,SQ8", 128, 32_768), ("IVF64,SQ8", 1024, 10_240)],
)
def test_codes_that_are_searched_do_not_fit_into_a_cores_cache(factory: str, dim: int, number: int) -> None:
    assert rates._num_searched(factory, dim) == number


def test_clustering_takes_256_vectors_a_list(monkeypatch: pytest.MonkeyPatch) -> None:
    """So where codes are learned from more, all else that training takes is theirs."""
    monkeypatch.setattr(rates, "_VECTORS", 300)
    monkeypatch.setattr(rates, "_QUERIES", 16)
    monkeypatch.setattr(rates, "_CENTRES", 1)
    spent = [Spent(0.256, 0.256), Spent(100.0, 100.0)]  # of training a list, and the index
    monkeypatch.setattr(rates, "_spent", lambda function: (function(), spent.pop(0))[1])
    monkeypatch.setattr(rates, "_typical", lambda function: Spent(1.0, 1.0))
    known = Rates(chunks_per_token=0, places_per_token=0, documents_per_token=0, text_bytes=200)
    vectors = np.random.default_rng(0).standard_normal((5000, 8), dtype=np.float32)
    rates.measure_vectors(known, vectors, vectors, "IVF16,SQ8", RetroDbConfig(), 10**6)
    assert known.cluster.cpu == pytest.approx(0.256 / (10 * 256 * 8))
    num_lists = 16  # as many as can be of 300 vectors
    assert known.learn.cpu == pytest.approx((100 - known.cluster.cpu * 10 * num_lists * 256 * num_lists * 8) / 5000)


@pytest.mark.parametrize(
    "factory",
    ["Flat", "SQ8", "PQ4x4", "HNSW8", "IVF16,Flat", "IVF16_HNSW8,SQfp16", "OPQ8_16,IVF16,PQ8", "PCA8,IVF16,SQ8"],
)
def test_bytes_of_an_index(tmp_path: Path, factory: str) -> None:
    """Against faiss's own file."""
    vectors = np.random.default_rng(0).standard_normal((6000, 24)).astype(np.float32)
    index = VectorIndex.train(factory, "l2", vectors[:1000])
    index.add_codes(index.encode(vectors), np.arange(len(vectors)))
    names = {"embedder": "", "chunks": "", "signature": ""}
    manifest = IndexManifest(factory=factory, metric="l2", dim=24, num_trained=1000, num_vectors=6000, **names)
    index.save(tmp_path / "a.faissindex", manifest)
    found = index_bytes(factory, 24, 6000)
    assert found == pytest.approx((tmp_path / "a.faissindex").stat().st_size, rel=0.05)


def test_an_index_is_sharded_from_a_size_on() -> None:
    """The paper's, of 19 billion chunks: 1.37 TB in files of 128 GiB, trained on 39 vectors a list."""
    paper = "OPQ64_128,IVF4194304_HNSW32,PQ64"
    assert index_bytes(paper, 1024, 19 * 10**9) == pytest.approx(1.372e12, rel=0.002)
    assert -(-index_bytes(paper, 1024, 19 * 10**9) // MOST_BYTES) == 10
    assert num_training_vectors(paper, 19 * 10**9) == 39 * 2**22
    assert num_training_vectors("IVF1048576,PQ64", 19 * 10**9) == 64 * 2**20
    assert num_training_vectors("IVF1024,PQ64", 19 * 10**9) == 65_536


def test_time_of_several_processes() -> None:
    """What one does while the others wait is not shared."""
    each = Spent(1e-3, 1e-3)
    known = Rates(
        chunks_per_token=0, places_per_token=0, documents_per_token=0, text_bytes=200, embed=each, cluster=each
    )
    known.fixed = known.per_chunk = dict.fromkeys(TASKS, Spent())
    numbers = {"num_places": 1000, "num_documents": 10, "dim": 4, "num_train": 100}
    sizes = Sizes(num_chunks=1000, factory="IVF4,Flat", num_processes=8, stored=False, **numbers)
    estimate = Estimate(RetroDbConfig(), sizes, known)
    train, embed = estimate.of("index-train"), estimate.of("embed")
    assert train is not None and embed is not None
    assert train.alone.wall == pytest.approx(100 * 4 * 4 * 10 * 1e-3)
    assert train.seconds(8) == pytest.approx(train.alone.wall + 100 * 1e-3 / 8)
    many = Estimate(RetroDbConfig(), replace(sizes, num_train=5000), known).of("index-train")
    assert many is not None, "faiss takes 256 vectors a list"
    assert many.alone.wall == pytest.approx(256 * 4 * 4 * 4 * 10 * 1e-3)
    assert embed.seconds(8) == pytest.approx(1000 * 1e-3 / 8) and embed.disk == 16_000
    said = list(lines_of(estimate, TASKS))
    assert "1,000 chunks, index IVF4,Flat, 1,000 embedded a second, 8 processes" in said[0]
    assert any("index-train     16 s (16 s of it in one process)" in line for line in said), said


def test_a_dry_run_says_what_a_large_build_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "_SAMPLES", (1 << 10, 1 << 11))
    monkeypatch.setattr(stages, "project_embedder", lambda *_, **__: WordEmbedder())
    prefix = write_documents(tmp_path / "corpus", make_texts(40), tokenizer_of(tmp_path))
    given = {"data_paths": [prefix], "tokenizer": str(tmp_path / "tokenizer.model"), "index": "Flat", "chunk_length": 8}
    small = stages.dry_run(Preparation(tmp_path / "db", "build", given))
    assert not any("estimate" in line for line in small), "nothing is worth measuring"
    monkeypatch.setattr(lines, "FEWEST_CHUNKS", 10)
    said = stages.dry_run(Preparation(tmp_path / "db", "build", given))
    assert [line.split()[0] for line in said if line.startswith("  ")][:6] == [*TASKS, "all"]
    assert not (tmp_path / "db").exists()
