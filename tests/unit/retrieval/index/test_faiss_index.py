"""The vector index: exact where it should be, the same whatever the threads, and nothing damaged is opened."""

from __future__ import annotations

import hashlib
from pathlib import Path

import faiss
import numpy as np
import pytest

from megatron_grit.errors import ConfigError, DataError
from megatron_grit.retrieval.index.factory import choose_factory, lists_of, num_training_vectors
from megatron_grit.retrieval.index.faiss_index import VectorIndex, exact_search, new_index
from megatron_grit.retrieval.index.manifest import IndexManifest, is_whole, read_manifest
from megatron_grit.retrieval.index.search import ShardedIndex, merge_nearest

DIM = 16


def clustered(count: int, seed: int = 0, dim: int = DIM) -> np.ndarray:
    random = np.random.default_rng(seed)
    centres = np.random.default_rng(99).standard_normal((20, dim))
    return (centres[random.integers(0, 20, count)] + 0.4 * random.standard_normal((count, dim))).astype(np.float32)


def brute_force(queries: np.ndarray, vectors: np.ndarray, k: int, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Scores and ids by the definition, in float64."""
    q, v = queries.astype(np.float64), vectors.astype(np.float64)
    scores = ((q[:, None] - v[None]) ** 2).sum(2) if metric == "l2" else q @ v.T
    order = np.argsort(scores if metric == "l2" else -scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, order, 1), order


def filled(factory: str, vectors: np.ndarray, metric: str = "l2", first: int = 0, num_train: int = 500) -> VectorIndex:
    index = VectorIndex.train(factory, metric, vectors[:num_train])
    half = len(vectors) // 2
    for start, stop in ((0, half), (half, len(vectors))):
        index.add_codes(index.encode(vectors[start:stop]), np.arange(first + start, first + stop))
    return index


def saved(index: VectorIndex, path: Path) -> Path:
    manifest = IndexManifest(
        factory=index.factory,
        metric=index.metric,
        dim=index.dim,
        embedder="e",
        chunks="c",
        num_trained=500,
        num_vectors=len(index),
    )
    index.save(path, manifest)
    return path


@pytest.mark.parametrize("metric", ["l2", "inner_product"])
@pytest.mark.parametrize("factory", ["Flat", "IVF8,Flat"])
def test_an_exact_search_equals_numpy(factory: str, metric: str, tmp_path: Path) -> None:
    vectors, queries = clustered(700), clustered(30, seed=1)
    paths = []
    for number, (start, stop) in enumerate(((0, 300), (300, 301), (301, 700))):
        trained = filled(factory, vectors[:500], metric)
        index = VectorIndex.train(factory, metric, vectors[:500])
        index.add_codes(trained.encode(vectors[start:stop]), np.arange(start, stop))
        paths.append(saved(index, tmp_path / f"{number}.faissindex"))
    whole = ShardedIndex([filled(factory, vectors, metric)])
    for index in (whole, ShardedIndex.load(paths), ShardedIndex.load(paths, mapped=True)):
        index.set_search(index.num_lists, None)
        scores, ids = index.search(queries, 10)
        wanted_scores, wanted_ids = brute_force(queries, vectors, 10, metric)
        assert ids.tolist() == wanted_ids.tolist()
        np.testing.assert_allclose(scores, wanted_scores, rtol=1e-4, atol=1e-4)
        assert len(index) == 700
    scores, ids = exact_search(queries, vectors, 10, metric)
    assert ids.tolist() == wanted_ids.tolist()


def test_fewer_vectors_than_neighbors() -> None:
    vectors = clustered(3)
    for index in (
        filled("Flat", vectors),
        ShardedIndex([filled("Flat", vectors), VectorIndex.train("Flat", "l2", vectors)]),
    ):
        _, ids = index.search(vectors, 5)
        assert sorted(ids[0, :3].tolist()) == [0, 1, 2]
        assert ids[:, 3:].tolist() == [[-1, -1]] * 3
    assert exact_search(vectors, vectors[:0], 5, "l2")[1].shape == (3, 0)


def test_ids_beyond_32_bits() -> None:
    vectors, far = clustered(600), 2**40
    for factory in ("Flat", "IVF4,Flat"):
        index = filled(factory, vectors, first=far)
        index.set_search(4, None)
        assert index.search(vectors[:5], 1)[1].ravel().tolist() == [far + number for number in range(5)]


@pytest.mark.parametrize("factory", ["OPQ4_8,IVF8_HNSW4,PQ4x4", "PCA8,IVF8,SQ8", "IVF8,Flat"])
def test_threads_change_nothing(factory: str) -> None:
    vectors = clustered(5000)
    found = set()
    before = faiss.omp_get_max_threads()
    try:
        for threads in (1, 2, 3):
            faiss.omp_set_num_threads(threads)
            index = filled(factory, vectors)
            index.set_search(4, 16)
            content = faiss.serialize_index(index.index).tobytes()
            found.add(hashlib.sha256(content + index.search(vectors[:200], 5)[0].tobytes()).hexdigest())
    finally:
        faiss.omp_set_num_threads(before)
    assert len(found) == 1


@pytest.mark.parametrize(
    ("factory", "words"),
    [
        ("Nonsense", r"faiss does not make one \(could not parse index string Nonsense\)"),
        ("IVF0,Flat", "has no lists; give a number of them"),
        ("IVF8,PQ4x4,RFlat", "more than codes"),
        ("IDMap,Flat", "more than codes"),
        ("IDMap2,Flat", "more than codes"),
        ("NSG8", "more than codes"),
        ("HNSW8_2x4", "faiss does not make one|more than codes"),
        # Adding codes to the lists of these corrupts the heap.
        ("IVF8,PQ4x4fs", "IndexIVFPQFastScan"),
        ("IVF8,PQ4x4fsr", "IndexIVFPQFastScan"),
        ("IVF8,RaBitQfs", "IndexIVFRaBitQFastScan"),
        ("PQ4x4fs", "IndexPQFastScan"),
        ("RaBitQfs", "IndexRaBitQFastScan"),
        # These learn something else with each number of threads.
        ("RQ4x4", "IndexResidualQuantizer"),
        ("IVF8,RQ4x4", "IndexIVFResidualQuantizer"),
        ("LSQ4x4", "IndexLocalSearchQuantizer"),
        ("PRQ2x2x4", "IndexProductResidualQuantizer"),
        ("LSHrt", "IndexLSH"),
        # Searched by codes that are refined, or by none.
        ("IVF8,PQ4\\+8", "IndexIVFPQR"),
        ("Residual2x3,PQ8", "Index2Layer"),
        ("IMI2x3,Flat", "more than codes"),
        ("IVF8_NSG8,Flat", "its lists are found by a IndexNSG"),
        ("IVF8\\(PQ2x4\\),Flat", "its lists are found by a IndexPQ"),
        ("IVF16\\(IVF4,Flat\\),Flat", "its lists are found by a IndexIVFFlat"),
    ],
)
def test_factories_that_are_refused(factory: str, words: str) -> None:
    with pytest.raises(ConfigError, match=f"index '{factory}'.*{words}"):
        new_index(factory.replace("\\", ""), "l2", DIM)


@pytest.mark.parametrize("metric", ["l2", "inner_product"])
@pytest.mark.parametrize("factory", ["PQ4x4fs", "IVF8,PRQ2x2x4fs", "IVF8,RQ4x4fs", "IVF8,LSQ4x4fs", "IVF8,RaBitQfs"])
def test_codes_in_blocks_are_refused_for_each_metric(factory: str, metric: str) -> None:
    with pytest.raises(ConfigError, match="FastScan|faiss does not make one"):
        new_index(factory, metric, DIM)


WORKING = ["Flat", "PQ4x4", "PQ4x5", "SQ8", "SQ6", "SQ4", "SQfp16", "SQbf16", "SQ8_direct", "RaBitQ", "RaBitQ4"]
WORKING += [f"IVF8,{codes}" for codes in WORKING] + ["IVF8,PQ4x4np", "IVF8_HNSW4,SQ8", "IVF8(Flat),Flat"]
WORKING += [
    "PCA8,Flat",
    "PCAR8,PQ4x4",
    "PCAW8,IVF8,SQ8",
    "OPQ4_8,IVF8,PQ4x4",
    "RR8,Flat",
    "L2norm,IVF8,Flat",
    "Pad20,SQ8",
    *("HNSW8", "HNSW8,Flat", "HNSW8_SQ8", "HNSW8_PQ4x4", "PCA8,HNSW8"),
]


@pytest.mark.parametrize("metric", ["l2", "inner_product"])
@pytest.mark.parametrize("factory", WORKING)
def test_factories_that_work_find_what_faiss_finds(factory: str, metric: str, tmp_path: Path) -> None:
    """Trained, filled from codes in parts, saved and opened; against the engine's own way of adding vectors, and with
    the same bytes for each number of threads."""
    vectors, queries = clustered(5000), clustered(40, seed=1)
    digests, before = set(), faiss.omp_get_max_threads()
    try:
        for threads in (1, 3):
            faiss.omp_set_num_threads(threads)
            index = filled(factory, vectors, metric)
            digests.add(hashlib.sha256(faiss.serialize_index(index.index).tobytes()).hexdigest())
    finally:
        faiss.omp_set_num_threads(before)
    assert len(digests) == 1
    path = saved(index, tmp_path / "i.faissindex")
    found = []
    plain = VectorIndex.train(factory, metric, vectors[:500])
    plain.index.add(vectors)
    for each in (index, VectorIndex.load(path), VectorIndex.load(path, mapped=True), plain):
        each.set_search(8, 512)
        found.append(each.search(queries, 10))
    assert (found[0][1] >= 0).all()
    for scores, ids in found[1:3]:
        assert (ids == found[0][1]).all() and (scores == found[0][0]).all()
    if index.is_graph:  # the engine's own, made by several threads, is another one
        assert metric == "inner_product" or np.isclose(found[3][0], found[0][0]).mean() > 0.9
    else:
        np.testing.assert_allclose(found[3][0], found[0][0], rtol=1e-3, atol=1e-3)


def test_what_must_be_trained_is_trained() -> None:
    """By default as well."""
    for factory in WORKING:
        index = new_index(factory, "l2", DIM)
        assert index.is_trained or num_training_vectors(factory, 10**6) >= 65_536, factory
    assert num_training_vectors("L2norm,Flat", 10**6) == num_training_vectors("SQfp16", 10**6) == 0
    assert num_training_vectors("PCA16,Flat", 1000) == 1000


@pytest.mark.parametrize(
    ("factory", "least"),
    [("IVF64,Flat", 64), ("PQ4x8", 256), ("IVF8,PQ4x4", 16), ("OPQ4_8,PQ4x4", 256), ("PCA8,Flat", 1)],
)
def test_too_few_vectors_to_train_on(factory: str, least: int) -> None:
    words = (
        f"index '{factory}' needs {least} vectors at least to be trained on, and there are {least - 1}; raise ntrain"
    )
    with pytest.raises(ConfigError, match=words):
        VectorIndex.train(factory, "l2", clustered(least - 1))
    if least > 1:
        VectorIndex.train(factory, "l2", clustered(least))


def test_few_vectors_are_warned_of_once(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    VectorIndex.train("IVF8,PQ4x4", "l2", clustered(100))
    assert caplog.text.count("raise ntrain") == 1
    out, err = capfd.readouterr()
    assert "clustering" not in out + err


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_flip, "does not match its checksum and is not opened"),
        (lambda path: path.write_bytes(path.read_bytes()[:-7]), "does not match its checksum"),
        (lambda path: path.unlink(), "is missing"),
        (lambda path: path.with_suffix(".json").unlink(), "json: is missing"),
        (lambda path: path.with_suffix(".json").write_text("{"), "json: cannot be read"),
        (lambda path: path.with_suffix(".json").write_text('{"factory": "Flat"}'), "json: cannot be read"),
    ],
)
def test_damaged_files_are_not_opened(tmp_path: Path, damage: object, words: str) -> None:
    path = saved(filled("IVF4,Flat", clustered(600)), tmp_path / "a.faissindex")
    assert is_whole(path, read_manifest(path))
    damage(path)  # type: ignore[operator]
    with pytest.raises(DataError, match=words):
        VectorIndex.load(path)


def test_a_small_file_with_large_tables_opens(tmp_path: Path) -> None:
    """faiss computes tables on opening: here 4 MB, from a file of a few hundred kB."""
    vectors = clustered(1000)
    path = saved(filled("IVF256,PQ16np", vectors, num_train=1000), tmp_path / "i.faissindex")
    assert path.stat().st_size < 1 << 19
    _, ids = VectorIndex.load(path).search(vectors[:5], 1)
    assert ids.shape == (5, 1)


def test_an_index_of_something_else_is_refused(tmp_path: Path) -> None:
    path = saved(filled("Flat", clustered(20)), tmp_path / "a.faissindex")
    assert len(VectorIndex.load(path, embedder="e", chunks="c")) == 20
    with pytest.raises(DataError, match="another embedder"):
        VectorIndex.load(path, embedder="f")
    with pytest.raises(DataError, match="other chunks"):
        VectorIndex.load(path, chunks="d")
    with pytest.raises(DataError, match="queries have 4 channels, the index 16"):
        VectorIndex.load(path).search(np.zeros((1, 4), np.float32), 1)


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(filled("Flat", clustered(20)), tmp_path / "a.faissindex")
    before = path.read_bytes()

    def fail(*args: object) -> None:
        raise RuntimeError("write error: No space left on device")

    monkeypatch.setattr(faiss, "write_index", fail)
    with pytest.raises(DataError, match="a.faissindex: cannot be written .*No space left"):
        saved(filled("Flat", clustered(30)), path)
    assert path.read_bytes() == before
    assert not list(tmp_path.glob(".*.tmp"))


def test_gaps_need_ids() -> None:
    index = filled("Flat", clustered(20))
    with pytest.raises(ConfigError, match="holds no ids"):
        index.add_codes(index.encode(clustered(5)), np.arange(30, 35))


def test_auto_fits_into_memory() -> None:
    assert choose_factory(1000, 64, 2**30) == "Flat"
    assert choose_factory(10**6, 384, 16 * 2**30) == "IVF8192,Flat"
    assert choose_factory(10**7, 384, 8 * 2**30).endswith("_HNSW32,SQ8")
    assert choose_factory(10**8, 384, 8 * 2**30).startswith("OPQ")
    for memory in (2**27, 2**28, 2**29, 2**30, 2**31):
        factory = choose_factory(10**6, 384, memory)
        code = {"Flat": 4 * 384, "SQ8": 384}.get(factory.rpartition(",")[2]) or int(factory.rpartition("PQ")[2])
        lists = lists_of(factory)
        assert lists is not None
        assert 10**6 * (code + 8) + 4 * lists * 384 <= memory
    with pytest.raises(ConfigError, match="raise index_memory_gb"):
        choose_factory(10**9, 384, 2**30)


@pytest.mark.parametrize("count", [60_000, 10**6, 10**8])
def test_auto_is_trained_with_enough_vectors(count: int) -> None:
    factory = choose_factory(count, 64, 64 * count)
    lists = lists_of(factory)
    assert lists is not None
    assert 39 * lists <= num_training_vectors(factory, count) <= count
    assert num_training_vectors("Flat", count) == 0
    assert lists_of("IVF4k,Flat") == 4096


@pytest.mark.parametrize("metric", ["l2", "inner_product"])
def test_merging_is_that_of_the_whole(metric: str) -> None:
    vectors, queries = clustered(300), clustered(20, seed=2)
    parts = []
    for start, stop in ((0, 100), (100, 103), (103, 300)):
        scores, ids = exact_search(queries, vectors[start:stop], 7, metric)
        parts.append((scores, ids + start))
    wanted = exact_search(queries, vectors, 7, metric)[1]
    assert merge_nearest(parts, 7, metric)[1].tolist() == wanted.tolist()
    assert merge_nearest(parts[::-1], 7, metric)[1].tolist() == wanted.tolist()
