"""Searching several files: the order of what is found, who holds what, and where it is placed."""

from __future__ import annotations

import dataclasses
import inspect
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

faiss = pytest.importorskip("faiss")

from megatron_grit.config.database.schema import RetroDbConfig, config_problems  # noqa: E402
from megatron_grit.data.chunks.project import Project  # noqa: E402
from megatron_grit.data.chunks.versions import read_version  # noqa: E402
from megatron_grit.errors import ConfigError, DataError  # noqa: E402
from megatron_grit.retrieval.database.versions import open_index  # noqa: E402
from megatron_grit.retrieval.index import faiss_index  # noqa: E402
from megatron_grit.retrieval.index.faiss_index import VectorIndex, exact_search, gpus_of_process  # noqa: E402
from megatron_grit.retrieval.index.search import Further, ShardedIndex, dealt_out, find_allowed, merge_nearest  # noqa: E402
from megatron_grit.retrieval.stages.query_neighbors import index_to_search, query_neighbors  # noqa: E402
from megatron_grit.retrieval.work import Worker  # noqa: E402
from tests.unit.retrieval.databases import (  # noqa: E402
    WordEmbedder,
    another,
    build,
    make_project,
    make_texts,
    tokenizer_of,
    write_documents,
)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Project:
    folder = tmp_path_factory.mktemp("sharded")
    prefix = write_documents(folder / "corpus", make_texts(10), tokenizer_of(folder))
    project = make_project(folder / "db", [prefix], folder, num_shards=2, index="IVF4,Flat", nprobe=2)
    return build(project, WordEmbedder(), query=False)


# --- What is found ----------------------------------------------------------------------------------------------------


def plain_merge(parts: list[tuple[np.ndarray, np.ndarray]], k: int, metric: str) -> list[list[tuple[float, int]]]:
    """By sorting each query's pairs."""
    rows = []
    for query in range(len(parts[0][0])):
        pairs = [
            (score, number)
            for scores, ids in parts
            for score, number in zip(scores[query].tolist(), ids[query].tolist(), strict=True)
            if number >= 0
        ]
        best = sorted(pairs, key=lambda pair: (pair[0] if metric == "l2" else -pair[0], pair[1]))[:k]
        rows.append(best + [(np.inf if metric == "l2" else -np.inf, -1)] * (k - len(best)))
    return rows


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_merging_orders_by_score_and_then_by_id(data: st.DataObject) -> None:
    """Few different scores, so that many are equal, at the last place as well."""
    metric, k = data.draw(st.sampled_from(["l2", "inner_product"])), data.draw(st.integers(1, 6))
    num_queries, num_parts = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4))
    ids = iter(np.random.default_rng(data.draw(st.integers(0, 99))).permutation(1000).tolist())
    parts = []
    for _ in range(num_parts):
        width = data.draw(st.integers(0 if num_parts > 1 else 1, 6))
        scores = np.zeros((num_queries, width), np.float32)
        numbers = np.full((num_queries, width), -1, np.int64)
        for query in range(num_queries):
            count = data.draw(st.integers(0, width))
            found = sorted(data.draw(st.lists(st.integers(0, 3), min_size=count, max_size=count)))
            scores[query, :count] = found if metric == "l2" else found[::-1]
            scores[query, count:] = 3e38 if metric == "l2" else -3e38  # as faiss says it
            numbers[query, :count] = [next(ids) for _ in range(count)]
        parts.append((scores, numbers))
    wanted = plain_merge(parts, k, metric)
    for order in (parts, parts[::-1]):
        scores, numbers = merge_nearest(order, k, metric)
        assert scores.dtype == np.float32 and numbers.dtype == np.int64
        merged = [list(zip(s, n, strict=True)) for s, n in zip(scores.tolist(), numbers.tolist(), strict=True)]
        assert merged == wanted


def test_equal_scores_stand_in_the_order_of_ids_whatever_the_number_of_files() -> None:
    """The same vector a hundred times: more than faiss keeps in a heap, and it leaves them unordered."""
    vectors = np.concatenate([np.zeros((150, 4)), np.ones((20, 4))]).astype(np.float32)
    found = []
    for edges in ([0, 170], [0, 40, 90, 170]):
        shards = []
        for start, stop in zip(edges[:-1], edges[1:], strict=True):
            shard = VectorIndex.train("Flat", "l2", vectors)
            shard.add_codes(shard.encode(vectors[start:stop]), np.arange(start, stop))
            shards.append(shard)
        found.append(ShardedIndex(shards).search(np.zeros((3, 4), np.float32), 160)[1].tolist())
    assert found[0] == found[1] == [list(range(160))] * 3


@given(st.lists(st.integers(0, 100), max_size=20), st.integers(1, 6))
def test_shares_are_even(sizes: list[int], count: int) -> None:
    shares = dealt_out(sizes, count)
    assert sorted(number for share in shares for number in share) == list(range(len(sizes)))
    loads = [sum(sizes[number] for number in share) for share in shares]
    assert max(loads) - min(loads) <= max(sizes, default=0)
    if len(sizes) >= count:
        assert all(shares)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32 - 1), st.integers(1, 8), st.floats(0, 1))
def test_deeper_searches_have_no_more_candidates_than_the_first(seed: int, num_query: int, share: float) -> None:
    random = np.random.default_rng(seed)
    vectors = random.standard_normal((200, 4)).astype(np.float32)
    dropped = random.random(200) < share
    index = VectorIndex.train("Flat", "l2", vectors)
    index.add_codes(index.encode(vectors), np.arange(200))
    sizes = []

    class Counting(ShardedIndex):
        def search(self, vectors_ND: np.ndarray, k: int, further: Further | None = None) -> Any:
            sizes.append(len(vectors_ND) * k)
            return super().search(vectors_ND, k, further)

    _, found = find_allowed(
        Counting([index]), vectors[:9], num_query, num_query, lambda rows, ids: ~dropped[np.maximum(ids, 0)]
    )
    assert max(sizes) <= max(9 * num_query, 16 * num_query), sizes
    allowed = np.flatnonzero(~dropped)
    most = min(200, 16 * num_query)
    for row, query in zip(found, vectors[:9], strict=True):
        reached = np.argsort(((vectors - query) ** 2).sum(1), kind="stable")[:most]
        wanted = [number for number in reached.tolist() if number in allowed][:num_query]
        assert row[row >= 0].tolist() == wanted


@pytest.mark.parametrize("starts", [[0], [0, 150, 300]])
@pytest.mark.parametrize("factory", ["Flat", "SQ8", "PQ4x4", "RaBitQ", "IVF4,Flat", "IVF4_HNSW4,PQ4x4", "HNSW8"])
def test_ranges_are_passed_over_as_if_they_were_not_there(factory: str, starts: list[int]) -> None:
    """Beside a search for all vectors, by numpy; few and many ranges, other ones for each query, in one file or more.
    (A graph of HNSW is walked from elsewhere, so there only what is left out is compared.)"""
    random = np.random.default_rng(0)
    vectors = random.standard_normal((400, 16)).astype(np.float32)
    queries = vectors[:5] + 0.01
    trained = VectorIndex.train(factory, "l2", vectors)
    shards = []
    for start, stop in zip(starts, [*starts[1:], 400], strict=True):
        shard = VectorIndex(faiss.clone_index(trained.index), factory, "l2")
        shard.add_codes(shard.encode(vectors[start:stop]), np.arange(start, stop))
        shards.append(shard)
    index = ShardedIndex(shards)
    index.set_search(4, 64)
    _, ranked = index.search(queries, 400)
    index.removed = np.array([[390, 395]])
    for number in (1, 30):
        firsts = random.integers(0, 380, (5, number))
        without = np.stack([firsts, firsts + random.integers(0, 20, (5, number))], axis=2)
        scores, found = index.search(queries, 20, Further(without))
        for row, ranges, ids in zip(range(5), without.tolist(), found.tolist(), strict=True):
            gone = {i for first, stop in [*ranges, [390, 395]] for i in range(first, stop)}
            assert len(ids) == 20 and -1 not in ids and not gone & set(ids)
            if factory != "HNSW8":
                assert ids == [i for i in ranked[row].tolist() if i not in gone][:20]
        assert (np.diff(scores, axis=1) >= 0).all()


def test_more_lists_are_visited_where_those_that_were_hold_too_few() -> None:
    """Two far groups, a list each: around a query of one group only the other one is allowed."""
    random = np.random.default_rng(0)
    vectors = (random.standard_normal((100, 4)) + np.repeat([[0], [50]], 50, axis=0)).astype(np.float32)
    index = VectorIndex.train("IVF2,Flat", "l2", vectors)
    index.add_codes(index.encode(vectors), np.arange(100))
    sharded = ShardedIndex([index])
    sharded.set_search(1, None)
    passed_over = lambda rows: np.full((len(rows), 1, 2), [0, 50])  # noqa: E731
    _, found = find_allowed(sharded, vectors[:50], 4, 4, lambda rows, ids: ids >= 50, passed_over)
    distances = ((vectors[:50, None] - vectors[None]) ** 2).sum(-1)
    assert (found == np.argsort(distances[:, 50:], axis=1, kind="stable")[:, :4] + 50).all()


# --- Where the index is -----------------------------------------------------------------------------------------------


def processes(count: int) -> list[Worker]:
    """Some that open an index and never search, so that none waits for another one."""
    groups = [[number, True] for number in range(count)]
    return [
        Worker(rank, count, lambda value: groups, group=rank, num_groups=count)  # type: ignore[arg-type]
        for rank in range(count)
    ]


def test_spread_loads_only_what_a_process_holds(sharded: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the files that faiss is given to read."""
    read: list[tuple[str, int]] = []
    read_index = faiss.read_index

    def counted(path: str, flags: int) -> Any:
        read.append((Path(path).name, flags))
        return read_index(path, flags)

    monkeypatch.setattr(faiss, "read_index", counted)
    version = read_version(sharded.folder)
    files = [Path(file.path).name for file in version.segments[0].index]
    for placement, wanted in (("mapped", True), ("memory", False)):
        read.clear()
        open_index(another(sharded, index_placement=placement), version, Worker())
        assert [name for name, _ in read] == files
        assert all(bool(flags) == wanted for _, flags in read)
    held = []
    for this in processes(3):
        read.clear()
        index = open_index(another(sharded, index_placement="spread"), version, this)
        assert len(index) == version.num_chunks
        assert not any(flags for _, flags in read)
        held.append([name for name, _ in read])
    assert sorted(name for names in held for name in names) == files and max(map(len, held)) == 1
    read.clear()
    open_index(another(sharded, index_placement="spread"), version)
    assert all(flags for _, flags in read), "a look at the database loads an index of any size"


def test_too_few_files_are_warned_of_once(sharded: Project, caplog: pytest.LogCaptureFixture) -> None:
    version, spread = read_version(sharded.folder), another(sharded, index_placement="spread")
    for this in processes(2):
        open_index(spread, version, this)
    assert not caplog.text
    for this in processes(3):
        open_index(spread, version, this)
    assert caplog.text.count("the index has 2 files for 3 processes: 1 of them hold none; raise num_shards") == 1


def test_one_of_a_team_searches_and_the_others_open_nothing(sharded: Project) -> None:
    version = read_version(sharded.folder)
    follower = dataclasses.replace(Worker(), leads=False)
    for placement in ("mapped", "memory"):
        project = another(sharded, index_placement=placement)
        assert index_to_search(project, version, follower) is None
        assert index_to_search(project, version, Worker()) is not None


def test_every_placement_finds_the_same(sharded: Project, tmp_path: Path) -> None:
    found = []
    for placement in ("mapped", "memory", "spread"):
        shutil.copytree(sharded.folder, tmp_path / placement, ignore=shutil.ignore_patterns("query"))
        project = Project(tmp_path / placement, dataclasses.replace(sharded.config, index_placement=placement))
        query_neighbors(project, Worker(), WordEmbedder())
        (table,) = project.folder.glob("query/*/neighbors.npy")
        found.append((table.parent.name, table.read_bytes()))
    assert found[0] == found[1] == found[2]


def test_a_spread_index_refuses_what_one_index_refuses(sharded: Project) -> None:
    version, spread = read_version(sharded.folder), another(sharded, index_placement="spread")
    index = open_index(spread, version, Worker())
    with pytest.raises(DataError, match="queries have 3 channels, the index 16"):
        index.search(np.zeros((1, 3), np.float32), 1)
    scores, ids = index.search(np.zeros((0, 16), np.float32), 4)
    assert scores.shape == ids.shape == (0, 4)
    (path, _) = sorted(sharded.folder.glob("index/**/added_*.faissindex"))
    content = path.read_bytes()
    try:
        path.write_bytes(content[:-1] + b"x")
        with pytest.raises(DataError, match="was changed since this version"):
            open_index(spread, version, Worker())
    finally:
        path.write_bytes(content)


# --- GPUs, played by a module that notes what it is asked -------------------------------------------------------------


class FakeGpus:
    """faiss's GPU build as far as it is used here. An index on a GPU is the index itself, and counts its searches."""

    def __init__(self, count: int, refuse: str = "") -> None:
        self.count, self.refuse = count, refuse
        self.options: list[Any] = []
        self.devices: list[list[int]] = []
        self.searched: list[int] = []
        self.parameters: list[tuple[str, int]] = []
        self.num_resources = self.num_trainings = 0
        self.exact: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(faiss, name)

    def get_num_gpus(self) -> int:
        return self.count

    def StandardGpuResources(self) -> object:  # noqa: N802
        self.num_resources += 1
        return object()

    def GpuMultipleClonerOptions(self) -> SimpleNamespace:  # noqa: N802
        self.options.append(SimpleNamespace(useFloat16=False))
        return self.options[-1]

    def index_cpu_to_all_gpus(self, index: Any) -> Any:
        self.num_trainings += 1
        return index

    def index_cpu_to_gpu_multiple_py(self, *given: Any) -> Any:
        # The wrappers of GPU functions are in the CPU build as well, in Python.
        arguments = inspect.signature(faiss.index_cpu_to_gpu_multiple_py).bind(*given).arguments
        resources, index, options, gpus = (arguments[name] for name in ("resources", "index", "co", "gpus"))
        assert len(resources) == len(gpus) and options is self.options[-1]
        if self.refuse:
            raise RuntimeError(f"Error in somewhere at GpuCloner.cpp:1:\n{self.refuse}")
        self.devices.append(gpus)
        return SimpleNamespace(search=self._search_of(index))

    def _search_of(self, index: Any) -> Callable[[np.ndarray, int], Any]:
        def search(vectors: np.ndarray, k: int) -> Any:
            assert 0 < k <= 2048, "GPU index only supports min/max-K selection up to 2048"
            self.searched.append(k)
            return index.search(vectors, k)

        return search

    def GpuParameterSpace(self) -> SimpleNamespace:  # noqa: N802
        return SimpleNamespace(set_index_parameter=lambda index, name, value: self.parameters.append((name, value)))

    def knn_gpu(self, resources: Any, queries: np.ndarray, vectors: np.ndarray, k: int, **options: Any) -> Any:
        inspect.signature(faiss.knn_gpu).bind(resources, queries, vectors, k, **options)
        self.exact.append(options.pop("device"))
        return faiss.knn(queries, vectors, k, **options)


@pytest.fixture
def with_gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[..., FakeGpus]:
    def install(count: int, **options: str) -> FakeGpus:
        fake = FakeGpus(count, **options)
        monkeypatch.setattr(faiss_index, "_faiss", lambda: fake)
        faiss_index._gpu_resources.cache_clear()
        return fake

    return install


@pytest.mark.parametrize("placement", ["memory", "spread"])
def test_an_index_is_searched_on_all_gpus(sharded: Project, with_gpus: Callable[..., FakeGpus], placement: str) -> None:
    version = read_version(sharded.folder)
    queries = WordEmbedder().embed(make_texts(5, seed=8))
    wanted = open_index(sharded, version, Worker()).search(queries, 30)
    fake = with_gpus(2)
    on_gpu = another(sharded, index_placement=placement, index_on_gpu=True)
    index = open_index(on_gpu, version, Worker())
    assert fake.devices == [[0, 1]] * 2 and fake.num_resources == 2
    (options,) = {tuple(sorted(vars(options).items())) for options in fake.options}
    assert dict(options) == {
        "allowCpuCoarseQuantizer": True, "shard": True, "use_cuvs": False, "useFloat16": False
    }  # fmt: skip
    assert fake.parameters == [("nprobe", 2)] * 2
    found = index.search(queries, 30)
    assert fake.searched == [30, 30]
    assert (found[0] == wanted[0]).all() and (found[1] == wanted[1]).all()
    index.search(queries, 3000)
    assert fake.searched == [30, 30], "faiss finds at most 2,048 on a GPU"


def test_under_a_launcher_each_process_has_one(
    with_gpus: Callable[..., FakeGpus], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = with_gpus(4)
    assert gpus_of_process().devices == [0, 1, 2, 3]
    for name, value in {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "3"}.items():
        monkeypatch.setenv(name, value)
    assert gpus_of_process().devices == [3]
    vectors = np.eye(4, dtype=np.float32)
    assert exact_search(vectors, vectors, 1, "l2")[1].ravel().tolist() == [0, 1, 2, 3]
    assert fake.exact == [3]
    assert fake.num_resources == 4, "scratch memory was taken twice"


def test_what_cannot_be_on_a_gpu_is_one_line(sharded: Project, with_gpus: Callable[..., FakeGpus]) -> None:
    version = read_version(sharded.folder)
    project = another(sharded, index_placement="memory", index_on_gpu=True)
    with_gpus(0)
    with pytest.raises(ConfigError, match="index_on_gpu: this faiss finds no GPU; install its GPU build .faiss-gpu."):
        open_index(project, version, Worker())
    with_gpus(1, refuse="Number of sub-quantizers (7) is not supported")
    with pytest.raises(ConfigError, match=r"index 'IVF4,Flat' cannot be searched on GPU 0 \(Number of .* supported\)"):
        open_index(project, version, Worker())
    with_gpus(1)
    index = open_index(project, version, Worker())
    index.shards[0]._ivf = SimpleNamespace(nlist=4096)
    with pytest.raises(ConfigError, match="nprobe 3,000 is above 2,048, the most lists that faiss visits on a GPU"):
        index.set_search(3000, None)


def test_an_hnsw_graph_over_the_lists_is_set_beside_the_gpu(with_gpus: Callable[..., FakeGpus]) -> None:
    fake = with_gpus(1)
    vectors = np.random.default_rng(0).standard_normal((300, 8)).astype(np.float32)
    index = VectorIndex.train("IVF8_HNSW4,Flat", "l2", vectors)
    index.add_codes(index.encode(vectors), np.arange(300))
    index.to_gpus(gpus_of_process())
    assert fake.num_trainings == 1
    assert not fake.options[-1].shard and fake.options[-1].allowCpuCoarseQuantizer
    index.set_search(4, 40)
    assert fake.parameters == [("nprobe", 4), ("quantizer_efSearch", 40)]
    assert index._ivf.nprobe == 4 and faiss.downcast_index(index._ivf.quantizer).hnsw.efSearch == 40


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, "set index_placement to memory or spread"),
        ({"index_placement": "spread", "nprobe": 4096}, "nprobe 4,096 is above 2,048"),
        ({"index_placement": "memory", "num_neighbors_query": 3000}, "num_neighbors_query 3,000 is above 2,048"),
    ],
)
def test_settings_of_gpus_are_checked_at_once(change: dict[str, Any], words: str) -> None:
    (problem,) = config_problems(RetroDbConfig(index_on_gpu=True, **change))
    assert words in problem
    assert not list(config_problems(RetroDbConfig(**{"index_placement": "spread"} | change)))
