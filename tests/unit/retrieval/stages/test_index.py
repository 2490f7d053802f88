"""Training, filling and measuring an index: the recall that is promised, and settings that cannot be met."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_grit.config.database.schema import RetroDbConfig
from megatron_grit.data.chunks.chunk_db import ChunkDb
from megatron_grit.data.chunks.project import Project
from megatron_grit.errors import ConfigError, DataError
from megatron_grit.retrieval.database import index_files
from megatron_grit.retrieval.database.index_files import IndexFiles
from megatron_grit.retrieval.database.vectors import SegmentVectors, embed_chunks, find_chunks, open_vectors
from megatron_grit.retrieval.index import kmeans, threads
from megatron_grit.retrieval.index.factory import choose_factory, num_training_vectors
from megatron_grit.retrieval.index.faiss_index import VectorIndex, exact_search
from megatron_grit.retrieval.index.kmeans import KMeans
from megatron_grit.retrieval.index.manifest import read_manifest
from megatron_grit.retrieval.index.recall import RECALL_AT, choose_search, fewest, read_search, recall_of, without_own
from megatron_grit.retrieval.index.recall_queries import NUM_QUERIES, query_ids
from megatron_grit.retrieval.index.search import ShardedIndex
from megatron_grit.retrieval.index.training import Training
from megatron_grit.retrieval.stages import index_train
from megatron_grit.retrieval.stages.db_build import build_chunks
from megatron_grit.retrieval.stages.index_add import add_to_index
from megatron_grit.retrieval.stages.index_train import train_index
from megatron_grit.retrieval.work import Worker
from megatron_grit.store.blocks import read_arrays
from tests.unit.retrieval.databases import (
    WordEmbedder,
    another,
    make_project,
    make_texts,
    tokenizer_of,
    write_documents,
)
from tests.unit.retrieval.workers import run_together


class Words(WordEmbedder):
    sides_alike = True


@pytest.fixture(scope="module")
def chunks(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Chunks of 40 documents and of 20, no index."""
    folder = tmp_path_factory.mktemp("corpus")
    tokenizer = tokenizer_of(folder)
    paths = [write_documents(folder / name, make_texts(n, seed=n), tokenizer) for name, n in (("a", 40), ("b", 20))]
    project = make_project(folder / "db", paths, folder)
    build_chunks(project, Worker())
    return project


@pytest.fixture
def project(chunks: Project, tmp_path: Path) -> Project:
    """The same chunks in a directory of this test."""
    (tmp_path / "db").symlink_to(chunks.folder / "db")
    return Project(tmp_path, chunks.config)


def built(project: Project, embedder: Any = None, **settings: object) -> tuple[Project, IndexFiles]:
    project, embedder = another(project, **settings), embedder or Words()
    train_index(project, Worker(), embedder)
    add_to_index(project, Worker(), embedder)
    return project, IndexFiles(project, ChunkDb(project), embedder.fingerprint, embedder.dim)


def digests(files: IndexFiles) -> list[str]:
    return [read_manifest(path).sha256 for path in files.added]


@pytest.mark.parametrize("index", ["Flat", "IVF4,Flat"])
@pytest.mark.parametrize("num_shards", [1, 3])
def test_the_whole_path_is_exact_search(project: Project, index: str, num_shards: int) -> None:
    embedder = Words()
    project, files = built(project, index=index, num_shards=num_shards, nprobe=4)
    db = ChunkDb(project)
    vectors = embedder.embed(db.texts(np.arange(len(db))))
    found = ShardedIndex.load(files.added)
    found.set_search(4, None)
    assert len(found) == len(db)
    scores, _ = found.search(vectors[:50], 5)
    distances = ((vectors[:50, None].astype(np.float64) - vectors[None]) ** 2).sum(2)
    np.testing.assert_allclose(scores, np.sort(distances, axis=1)[:, :5], rtol=1e-4, atol=1e-3)
    assert read_search(files.search).recall > 0.98


@pytest.mark.parametrize("index", ["HNSW8", "PCA8,HNSW8_SQ8"])
def test_a_graph_is_searched_for_the_wanted_recall(project: Project, index: str) -> None:
    project, files = built(project, index=index, recall=0.6)
    search = read_search(files.search)
    assert search.nprobe is None and search.ef_search is not None and search.recall > 0.55
    again = digests(files)
    for path in files.added:
        path.unlink()
    built(project, index=index, recall=0.6, block_size=project.config.block_size)
    assert digests(files) == again


@pytest.mark.parametrize(
    ("index", "metric"),
    [("OPQ4_8,IVF8_HNSW4,PQ4x4", "l2"), ("IVF8,Flat", "inner_product"), ("PCA8,IVF8_HNSW4,SQ8", "l2")],
)
def test_many_lists_are_trained_by_all_processes(
    project: Project, monkeypatch: pytest.MonkeyPatch, index: str, metric: str
) -> None:
    """The same index by one process, by three, of vectors that are stored, and after a kill; and one that finds as much
    as that which faiss trains."""
    by_faiss, _ = built(project, index=index, metric=metric, nprobe=2)
    settings = {"index": index, "metric": metric, "nprobe": 2, "block_size": 50}
    wanted = read_search(IndexFiles(by_faiss, ChunkDb(by_faiss), "words-16", 16).search).recall
    monkeypatch.setattr(index_train, "SHARED_LISTS", 8)
    for module in (threads, kmeans):
        monkeypatch.setattr(module, "ROWS_OF_PART", 32)
    iterations: list[int] = []
    means = KMeans._means

    def counting(self: KMeans, *options: Any) -> Any:
        if len(iterations) in stops:
            stops.remove(len(iterations))
            raise KeyboardInterrupt
        iterations.append(options[-1])
        return means(self, *options)

    monkeypatch.setattr(KMeans, "_means", counting)
    project, stops, found = another(project, **settings), list[int](), []
    files = IndexFiles(project, ChunkDb(project), "words-16", 16)
    for num_workers, is_stored in ((1, False), (3, False), (1, True)):
        files.trained.unlink(missing_ok=True)
        if is_stored:
            embed_chunks(open_vectors(project, Worker(), Words()), Worker())
            stops = [len(iterations) + 4]
            with pytest.raises(KeyboardInterrupt):
                train_index(project, Worker(), Words())
            assert (files.root / "training").is_dir()
        run_together(num_workers, lambda worker: train_index(project, worker, Words()))
        found.append(read_manifest(files.trained).sha256)
        assert not (files.root / "training").exists()
    assert len(set(found)) == 1 and iterations.count(9) == 1 + 3 + 1 and iterations[-10:] == list(range(10))
    add_to_index(project, Worker(), Words())
    assert read_search(files.search).recall == pytest.approx(wanted, abs=0.1)


@pytest.mark.parametrize("shared_lists", [8, 1 << 14])
def test_the_process_that_trains_alone_has_all_threads(
    project: Project, monkeypatch: pytest.MonkeyPatch, shared_lists: int
) -> None:
    """Under torchrun each has one, and the others wait."""
    monkeypatch.setattr(index_train, "SHARED_LISTS", shared_lists)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2, 5, 7})
    train_codes, used = Training.train_codes, []

    def noting(self: Training, vectors: np.ndarray) -> None:
        used.append(self.faiss.omp_get_max_threads())
        train_codes(self, vectors)

    monkeypatch.setattr(Training, "train_codes", noting)
    project = another(project, index="IVF8,SQ8", block_size=10_000)
    run_together(2, lambda worker: train_index(project, worker, Words()))
    assert used == [5]


def test_more_shards_than_blocks(project: Project) -> None:
    project, files = built(project, num_shards=5, block_size=10_000)
    assert [len(VectorIndex.load(path)) > 0 for path in files.added] == [True] * 5
    with pytest.raises(ConfigError, match="num_shards 100000 is above"):
        built(project, num_shards=100_000)


def test_a_large_index_has_several_files(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """As few as keep each below the size that one process is given; num_shards says otherwise."""
    _, files = built(project)
    wanted = files.added[0].stat().st_size
    assert len(files.added) == 1
    monkeypatch.setattr(index_files, "MOST_BYTES", wanted // 3)
    _, files = built(project)
    sizes = [path.stat().st_size for path in files.added]
    assert len(sizes) == 3 and max(sizes) < wanted // 3 + 1000
    _, files = built(project, num_shards=2)
    assert len(files.added) == 2


def test_shards_are_filled_together(project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, files = built(project, index="IVF4,PQ4x4", num_shards=3)
    wanted = digests(files)
    filled: list[tuple[int, str]] = []
    save = VectorIndex.save

    def noted(self: VectorIndex, path: Path, manifest: Any) -> None:
        filled.append((threading.get_ident(), path.name))
        save(self, path, manifest)

    monkeypatch.setattr(VectorIndex, "save", noted)
    spread = another(project, index="IVF4,PQ4x4", num_shards=3, index_placement="spread")
    # One was there already when the others were lost.
    for path in files.added[1:]:
        path.unlink()
    run_together(2, lambda worker: add_to_index(spread, worker, Words()))
    assert digests(files) == wanted
    assert sorted(name for _, name in filled) == [path.name for path in files.added[1:]]
    for path in files.added:
        path.unlink()
    filled.clear()
    run_together(2, lambda worker: add_to_index(spread, worker, Words()))
    assert digests(files) == wanted
    assert len({thread for thread, _ in filled}) == 2 and len(filled) == 3


def test_stored_vectors_are_embedded_once_and_give_the_same(project: Project, tmp_path: Path) -> None:
    without, files = built(project, index="IVF4,Flat")
    wanted = digests(files)
    for path in [*files.added, files.trained]:
        path.unlink()
    embedder = Words()
    vectors = open_vectors(without, Worker(), embedder)
    embed_chunks(vectors, Worker())
    assert embedder.num_embedded == len(ChunkDb(without))
    _, files = built(without, embedder, index="IVF4,Flat")
    assert digests(files) == wanted
    ids = np.array([5, 0, 17, 16, 5])
    assert np.array_equal(vectors.of(ids), embedder.embed(ChunkDb(without).texts(ids)))
    db, before = ChunkDb(without), embedder.num_embedded
    rows = np.asarray(db.rows[:30])
    assert (rows[:, 0] == 0).all()
    texts = [*db.texts(range(30)), "none of them"]
    found = SegmentVectors([vectors]).of_queries(0, np.append(rows[:, 1], 10**6), np.append(rows[:, 2], 0), texts)
    assert embedder.num_embedded == before + 1
    assert np.array_equal(found, Words().embed(texts))


def test_half_precision_is_the_same_stored_and_not(project: Project) -> None:
    half = another(project, embedding_dtype="float16")
    vectors = open_vectors(half, Worker(), Words())
    direct = vectors.of(np.arange(20))
    embed_chunks(vectors, Worker())
    assert vectors.stored
    assert np.array_equal(vectors.of(np.arange(20)), direct)
    assert read_arrays(vectors.blocks.blocks[0].path)["data"].dtype == np.float16


def test_chunks_are_found_by_their_place(project: Project) -> None:
    rows = ChunkDb(project).rows
    plain = {tuple(row[:3]): number for number, row in enumerate(np.asarray(rows).tolist())}
    for dataset, count in ((0, 40), (1, 20), (2, 1)):
        documents = np.repeat(np.arange(count), 30)
        offsets = np.tile(np.arange(30) * 8, count)
        wanted = [plain.get((dataset, *place), -1) for place in zip(documents.tolist(), offsets.tolist(), strict=True)]
        assert find_chunks(rows, dataset, documents, offsets).tolist() == wanted


def test_nothing_is_done_twice_and_damage_is_repaired(project: Project) -> None:
    project, files = built(project, index="IVF4,Flat")
    embedder = Words()
    built(project, embedder)
    assert embedder.num_embedded == 0
    wanted = digests(files)
    content = bytearray(files.added[0].read_bytes())
    content[-9] ^= 1
    files.added[0].write_bytes(content)
    built(project, embedder)
    assert embedder.num_embedded > 0
    assert digests(files) == wanted
    VectorIndex.load(files.added[0])


def test_search_settings_are_measured_anew(project: Project) -> None:
    project, files = built(project, index="IVF4,Flat", nprobe=1)
    low, index = read_search(files.search), digests(files)
    embedder = Words()
    _, files = built(project, embedder, nprobe=4)
    assert (low.nprobe, read_search(files.search).nprobe) == (1, 4)
    assert low.recall < read_search(files.search).recall
    assert embedder.num_embedded == 0
    assert digests(files) == index


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"ntrain": 10**6}, r"ntrain 1,000,000 is above the \d+ chunks"),
        ({"index": "IVF64,Flat", "ntrain": 50}, "below the 64 lists of index IVF64,Flat; raise ntrain"),
        ({"index": "IVF64,Flat", "ntrain": 100, "train_load_fraction": 0.5}, "below the 64 lists"),
        ({"index": "Flat", "add_load_fraction": 0.5}, "holds no ids; set add_load_fraction to 1"),
        ({"index": "NSG8"}, "more than codes"),
        ({"index": "auto", "index_memory_gb": 1e-7}, "raise index_memory_gb"),
    ],
)
def test_settings_that_cannot_be_met(project: Project, settings: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        built(project, **settings)


def test_another_embedder_or_other_channels(project: Project) -> None:
    project, _ = built(project)
    for other in (Words(name="others"), Words(dim=8)):
        with pytest.raises(DataError, match="another embedder"):
            add_to_index(project, Worker(), other)


def test_missing_blocks_of_vectors_are_seen(project: Project) -> None:
    vectors = open_vectors(project, Worker(), Words())
    embed_chunks(vectors, Worker())
    vectors.blocks.blocks[1].path.unlink()
    again = open_vectors(project, Worker(), Words())
    assert not again.stored
    embed_chunks(again, Worker())
    assert again.stored


def test_the_sample_is_random_and_whole(project: Project) -> None:
    files = IndexFiles(another(project, index="IVF4,Flat", ntrain=60), ChunkDb(project), "e", 16)
    size = len(ChunkDb(project))
    sample = files.sample(size)
    assert len(set(sample.tolist())) == 60
    assert (np.diff(sample) > 0).all()
    assert sample.tolist() != list(range(60))
    assert 0.25 * size < sample.mean() < 0.75 * size
    seed = files.config.seed
    assert len(query_ids(10**6, seed)) == NUM_QUERIES
    assert not set(files.sample(10**6).tolist()) & set(query_ids(10**6, seed).tolist())
    assert sorted(query_ids(size, seed).tolist()) == list(range(size))
    # Of 19 billion chunks no permutation is made.
    many = files.sample(19 * 10**9)
    assert len(many) == 60 and many.max() > 2**32


def test_the_sample_is_counted_for_each_dataset(project: Project, tmp_path: Path) -> None:
    (tmp_path / "db").unlink()
    build_chunks(project, Worker())
    assert [info.n_chunks_sampled for info in project.infos()] == [0, 0]
    built(project, index="IVF4,Flat", ntrain=60)
    rows = read_arrays(project.merged / "sampled.hdf5")["chunks"]
    counts = [info.n_chunks_sampled for info in project.infos()]
    assert counts == np.bincount(rows[:, 0], minlength=2).tolist() and sum(counts) == 60 and min(counts) > 0


def test_one_chunk(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(tmp_path)
    prefix = write_documents(tmp_path / "a", ["a file"], tokenizer)
    project = make_project(tmp_path / "db", [prefix], tmp_path, index="auto", chunk_length=64)
    build_chunks(project, Worker())
    _, files = built(project)
    assert len(VectorIndex.load(files.added[0])) == 1
    assert read_search(files.search).recall == 1.0


class Sides(Words):
    """Queries and passages are embedded in different ways."""

    sides_alike = False

    def embed(self, texts: Any, side: str = "passage") -> np.ndarray:
        return super().embed(texts, side) * (3 if side == "query" else 1)


def test_recall_is_measured_as_queries_are_embedded(project: Project) -> None:
    embedder = Sides()
    _, files = built(project, embedder, index="IVF4,Flat", nprobe=4)
    _, vectors = files.queries.read()
    drawn = files.queries.drawn
    assert embedder.num_queries == len(drawn.texts)
    np.testing.assert_array_equal(vectors, Sides().embed(drawn.texts, "query"))
    assert drawn.texts == ChunkDb(project).texts(np.array(drawn.ids))
    assert read_search(files.search).queries == "chunks of the database"


def test_recall_is_measured_on_what_gets_neighbors(project: Project, tmp_path: Path) -> None:
    tokenizer = tokenizer_of(tmp_path)
    texts = make_texts(30, seed=77)
    other = write_documents(tmp_path / "questions", texts, tokenizer)
    config = project.config
    _, files = built(project, query_paths=[other, config.data_paths[0]], index="IVF4,Flat")
    drawn, db = files.queries.drawn, ChunkDb(project)
    ids = np.array(drawn.ids)
    assert drawn.source == "chunks of query_paths"
    own = np.flatnonzero(ids >= 0)
    assert db.texts(ids[own]) == [drawn.texts[place] for place in own]
    assert set(db.rows[ids[own], 0].tolist()) == {0}
    tokens = [tokenizer.encode(text) for text in texts]
    asked = {tokenizer.decode(ids[place : place + 8]) for ids in tokens for place in range(0, len(ids), 8)}
    assert asked <= set(drawn.texts)
    assert len(drawn.texts) > len(own) >= len(db) / 2
    # Neighbors for other files later change nothing of what was measured.
    again, _ = built(project, query_paths=[], index="IVF4,Flat")
    assert read_search(files.search).queries == "chunks of query_paths"


def test_recall_counts_what_exists() -> None:
    exact = np.array([[3, 4, -1], [-1, -1, -1], [7, 8, 9]])
    found = np.array([[4, 9, 9], [1, 2, 3], [9, 8, 7]])
    assert recall_of(found, exact).tolist() == [0.5, 1.0, 1.0]
    assert without_own(np.array([[5, 1, 2], [1, -1, -1]]), np.array([1, 1]), 2).tolist() == [[5, 2], [-1, -1]]


@pytest.mark.parametrize("wanted", [1, 2, 3, 16, 17, 63, 64, 1000])
def test_fewest(wanted: int) -> None:
    assert fewest(lambda number: number >= wanted, 64) == min(wanted, 64)


def mixture(count: int, seed: int) -> np.ndarray:
    """Points around 300 centres in 16 channels."""
    random = np.random.default_rng(seed)
    centres = 1.5 * np.random.default_rng(5).standard_normal((300, 16))
    return (centres[random.integers(0, 300, count)] + 0.5 * random.standard_normal((count, 16))).astype(np.float32)


@pytest.mark.slow
def test_the_promised_recall_holds_for_new_queries() -> None:
    """20,000 vectors and a memory limit at which auto takes a product quantiser."""
    vectors, new = mixture(20_000, 0), mixture(6000, 1)
    factory = choose_factory(len(vectors), 16, 1.2 * len(vectors) * (8 + 8) + 4 * 16 * 2048)
    assert "PQ8" in factory
    num_train = min(13_000, num_training_vectors(factory, len(vectors)))
    index = VectorIndex.train(factory, "l2", vectors[:num_train])
    index.add_codes(index.encode(vectors), np.arange(len(vectors)))
    sharded = ShardedIndex([index])
    ids = num_train + np.random.default_rng(2).choice(len(vectors) - num_train, NUM_QUERIES, replace=False)
    exact = without_own(exact_search(vectors[ids], vectors, RECALL_AT + 1, "l2")[1], ids, RECALL_AT)
    config = RetroDbConfig(recall=0.6)
    settings = choose_search(sharded, config, vectors[ids], ids, exact)
    assert settings.recall_low <= settings.recall <= settings.recall_high
    assert settings.num_queries == 3000
    sharded.set_search(settings.nprobe, settings.ef_search)
    found = recall_of(sharded.search(new, RECALL_AT)[1], exact_search(new, vectors, RECALL_AT, "l2")[1]).mean()
    print(f"{factory}: nprobe {settings.nprobe}, promised {settings.recall:.4f}, found {found:.4f}")
    assert abs(found - settings.recall) <= 0.01


def test_recall_that_cannot_be_reached_is_said(project: Project, caplog: pytest.LogCaptureFixture) -> None:
    built(project, index="IVF2,PQ2x4", recall=0.99)
    (warning,) = [record.message for record in caplog.records if "not the wanted recall" in record.message]
    assert "0.99, even where all of it is searched" in warning
    assert "--overwrite index-train" in warning
    caplog.clear()
    built(project, index="IVF2,Flat", recall=0.99)
    assert not [record for record in caplog.records if "not the wanted recall" in record.message]
