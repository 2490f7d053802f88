"""Rates of a build, measured in seconds with the functions that build.

1. A sample of the corpus goes through all tasks, in two sizes, with short random vectors in place of the embedder's:
   the difference of the two is what a chunk costs beside embedding and comparing (reading, text, checksums, files).
2. A few hundred chunks of the sample are embedded.
3. Their vectors, and as many more around them as it takes, are compared, encoded and searched with codes of the kind
   that the index will have.
"""

from __future__ import annotations

import contextlib
import io
import logging
import resource
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import numpy as np

from megatron_grit.config.database.schema import RetroDbConfig
from megatron_grit.data.chunks.chunk_db import ChunkDb
from megatron_grit.data.chunks.project import Project
from megatron_grit.data.indexed.reader import IndexedFile
from megatron_grit.data.indexed.writer import write_texts
from megatron_grit.data.text.markers import Side
from megatron_grit.inference.encoders.protocol import Embedder
from megatron_grit.retrieval.database.vectors import embed_chunks, open_vectors
from megatron_grit.retrieval.index.factory import code_bytes, lists_of, width_of
from megatron_grit.retrieval.index.faiss_index import VectorIndex, exact_search
from megatron_grit.retrieval.index.kmeans import ITERATIONS, POINTS_PER_LIST
from megatron_grit.retrieval.index.on_torch import nearest_centres
from megatron_grit.retrieval.index.recall import RECALL_AT
from megatron_grit.retrieval.index.recall_queries import NUM_QUERIES
from megatron_grit.retrieval.index.threads import ROWS_OF_PART
from megatron_grit.retrieval.stages.db_build import build_chunks
from megatron_grit.retrieval.stages.index_add import add_to_index
from megatron_grit.retrieval.stages.index_train import train_index
from megatron_grit.retrieval.stages.query_neighbors import query_neighbors
from megatron_grit.retrieval.work import Worker

if TYPE_CHECKING:
    from megatron_grit.inference.model_group import ModelGroup

_SAMPLES = 1 << 18, 1 << 20
"""Tokens of the two samples of the corpus."""
_RUNS = 16
"""Places of the corpus that a sample is read from."""
_EMBED_SECONDS = 3.0
_EMBED_AT_A_TIME = 256
_VECTORS = 10_240
"""Vectors that are compared."""
_SEARCHED_BYTES = 1 << 22
"""Of the codes that are searched, at least, where four times as many vectors have so many: codes that stay in a core's
own cache are read faster than those of an index."""
_LEARNT_FROM = 40_960
"""Vectors that codes are trained on, at most: from about so many on faiss takes a tenth of the time for each."""
_QUERIES = 1024
_CENTRES = 256
"""Of the lists that are trained to time k-means."""
_SHORTEST = 8
"""Vectors of a list, at least, of the index that is searched."""
_UNKNOWN_NPROBE = 32
"""Share of the lists, as a divisor, that are assumed to be visited where nprobe is to be chosen."""
_REPEATS = 3
"""Of what takes milliseconds; the middle one counts, as the build shares the machine with whatever else runs there."""
_WIDTH = 8
"""Channels of the vectors in place of the embedder's."""


@dataclass(frozen=True)
class Spent:
    """Time that something took."""

    wall: float = 0.0
    """Seconds."""
    cpu: float = 0.0
    """Seconds of all of this process's threads."""

    def __sub__(self, other: Spent) -> Spent:
        return Spent(self.wall - other.wall, self.cpu - other.cpu)

    def __add__(self, other: Spent) -> Spent:
        return Spent(self.wall + other.wall, self.cpu + other.cpu)

    def times(self, count: float) -> Spent:
        """That of so many."""
        return Spent(max(0.0, self.wall * count), max(0.0, self.cpu * count))


@dataclass(kw_only=True)
class Rates:
    """What parts of a build cost, one by one, in one process."""

    chunks_per_token: float
    """Chunks that are kept, of a token of the corpus."""
    places_per_token: float
    """Chunks that neighbors are searched for: repeated and empty ones as well."""
    documents_per_token: float
    text_bytes: float
    """Of a chunk's text."""
    fixed: dict[str, Spent] = field(default_factory=dict)
    """Of each task, whatever its size; query-neighbors and index-add without comparing vectors."""
    per_chunk: dict[str, Spent] = field(default_factory=dict)
    """Of each task, as ``fixed``."""
    embed: Spent = Spent()
    """Of one chunk, reading its text and writing its vector included."""
    compare: Spent = Spent()
    """Of one query with one channel of one vector, all with all, as exact search does."""
    cluster: Spent = Spent()
    """Of one vector with one channel of one centre, in one iteration of k-means, as faiss trains lists."""
    assign: Spent = Spent()
    """The same, as processes train lists together."""
    scan: Spent = Spent()
    """Of one query with one vector of the index, or of a list that it visits, in codes of the index's kind; of lists of
    the length that they will have."""
    ask: Spent = Spent()
    """Of one query of an index, whatever its size, for as many neighbors as are searched; without finding lists."""
    encode: Spent = Spent()
    """Of one vector into such a code."""
    learn: Spent = Spent()
    """Of one vector, to train such codes on it."""
    memory: int = 0
    """Bytes of a process that holds the embedder and does nothing, as of :func:`own_bytes`."""
    batch: int = 0
    """Bytes that embedding needs beside those."""


class _ShortVectors:
    """Random vectors of a few channels, which cost nothing."""

    dim, fingerprint, sides_alike = _WIDTH, "short random vectors", True
    model_group: ModelGroup | None = None

    def embed(self, texts: Sequence[str], side: Side = "passage") -> np.ndarray:
        return np.random.default_rng(len(texts)).standard_normal((len(texts), _WIDTH), dtype=np.float32)


def nprobe_of(config: RetroDbConfig, lists: int) -> int:
    """Lists that a query visits: as the configuration says, or by a guess."""
    return min(lists, config.nprobe or max(1, lists // _UNKNOWN_NPROBE))


def measure(project: Project, embedder: Embedder, factory: str, num_train: int, num_chunks: int) -> Rates:
    """Measure on a project's corpus. Writes to a temporary folder alone.

    Args:
        project: whose files are there.
        embedder: of its vectors.
        factory: string of the index that is to be built.
        num_train: vectors that it is to be trained on.
        num_chunks: vectors that it is to hold, about.

    Raises:
        DataError: a file of the corpus is damaged.
    """
    with tempfile.TemporaryDirectory(prefix="build-db-") as name, _quiet():
        folder = Path(name)
        sizes, spent = [], []
        for size in _SAMPLES:
            sample = _sample_project(project, folder / str(size), size)
            spent.append(_run_tasks(sample))
            # What is compared is told by itself, with the embedder's channels.
            db, each = ChunkDb(sample), _search_of(sample).times(1 / _QUERIES)
            num_asked = len(np.load(next(sample.folder.glob("query/*/neighbors.npy")), mmap_mode="r"))
            spent[-1]["query-neighbors"] -= each.times(num_asked)
            spent[-1]["index-add"] -= _exact_search_of(len(db), sample.config.metric) + each.times(
                min(NUM_QUERIES, len(db))
            )
            sizes.append((db, sample))
            if len(sizes) == 1:
                held = own_bytes()  # with all that the tasks import
        (small, _), (large, sample) = sizes
        file = sample.file(0)
        num_tokens = file.bin_bytes // file.dtype.itemsize
        num_places = len(np.load(next(sample.folder.glob("query/*/neighbors.npy")), mmap_mode="r"))
        texts = large.texts(np.random.default_rng(0).permutation(len(large))[:2048])
        rates = Rates(
            chunks_per_token=len(large) / num_tokens,
            places_per_token=num_places / num_tokens,
            documents_per_token=file.num_documents / num_tokens,
            text_bytes=float(np.mean([len(text.encode()) for text in texts])),
            memory=held,
        )
        for task in spent[0]:
            each = (spent[1][task] - spent[0][task]).times(1 / max(1, len(large) - len(small)))
            rates.per_chunk[task] = each
            rates.fixed[task] = (spent[0][task] - each.times(len(small))).times(1)
    with most_beyond() as batch:
        vectors, rates.embed = _embed(embedder, texts)
    rates.batch = batch[0]
    rates.embed += rates.per_chunk["embed"]
    trained_on = vectors_around(vectors, num_train)
    searched = vectors_around(vectors, _num_searched(factory, vectors.shape[1]))
    measure_vectors(rates, trained_on, searched, factory, project.config, num_chunks)
    return rates


def _num_searched(factory: str, dim: int) -> int:
    """Vectors of an index with lists that is searched: lists of more vectors differ more in length, too, as those of
    the index will, and the longer a list is, the more queries visit it."""
    if lists_of(factory) is None:
        return _VECTORS
    return min(max(_VECTORS, _SEARCHED_BYTES // code_bytes(factory, dim)), 4 * _VECTORS)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Progress and log of the sample's build would be taken for those of the real one."""
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(logging.NOTSET)


def own_bytes() -> int:
    """Memory of this process without pages of files, which the system takes back when it needs them; where that is not
    known, the most that it has had so far."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return 1024 * int(next(line.split()[1] for line in lines if line.startswith("RssAnon:")))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextlib.contextmanager
def most_beyond() -> Iterator[list[int]]:
    """Within it one number, of bytes: the most by which this process's memory exceeds what it was before. It is looked
    at so seldom that this takes no time."""
    before, most, done = own_bytes(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            most[0] = max(most[0], own_bytes() - before)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield most
    finally:
        done.set()
        watcher.join()


def _spent(function: Callable[[], object]) -> Spent:
    began = time.perf_counter(), time.process_time()
    function()
    return Spent(time.perf_counter() - began[0], time.process_time() - began[1])


def _sample_project(project: Project, folder: Path, num_tokens: int) -> Project:
    """A project of documents from several places of the corpus."""
    config, prefix = project.config, folder / "sample"
    folder.mkdir(parents=True)
    tokenizer = project.tokenizer
    texts = (tokens.tolist() for tokens in _documents(project, num_tokens))
    write_texts(prefix, texts, tokenizer.vocab_size, tokenizer.fingerprint)
    kept = {name: getattr(config, name) for name in _SETTINGS}
    return Project(folder / "db", RetroDbConfig(**kept, data_paths=[str(prefix)], index="Flat"))


_SETTINGS = (
    "tokenizer chunk_length min_chunk_tokens duplicates near_threshold minhash_permutations valid_fraction seed "
    "doc_block_size block_size num_neighbors_query num_neighbors_save max_overlap"
).split()


def _documents(project: Project, num_tokens: int) -> Iterator[np.ndarray]:
    """Documents of about so many tokens in all, from places spread over all files by their size."""
    files = [project.open(prefix) for prefix in project.config.data_paths]
    sizes = np.array([file.bin_bytes // file.dtype.itemsize for file in files])
    for place in (np.arange(_RUNS) + 0.5) / _RUNS * sizes.sum():
        number = int(np.searchsorted(np.cumsum(sizes), place, side="right"))
        file: IndexedFile = files[number]
        inside = (place - (sizes[:number].sum())) / max(1, sizes[number])
        left, document = num_tokens // _RUNS, int(inside * file.num_documents)
        while left > 0 and document < file.num_documents:
            tokens = file.read(*file.sequences(document))
            if len(tokens):
                yield tokens
            left -= max(1, len(tokens))
            document += 1


def _run_tasks(project: Project) -> dict[str, Spent]:
    alone, embedder = Worker(), _ShortVectors()
    tasks: dict[str, Callable[[], object]] = {
        "db-build": lambda: build_chunks(project, alone),
        "embed": lambda: embed_chunks(open_vectors(project, alone, embedder), alone),
        "index-train": lambda: train_index(project, alone, embedder),
        "index-add": lambda: add_to_index(project, alone, embedder),
        "query-neighbors": lambda: query_neighbors(project, alone, embedder),
    }
    return {name: _spent(task) for name, task in tasks.items()}


def _search_of(project: Project) -> Spent:
    """Of as many queries as are timed, in the index of a sample."""
    (path,) = project.folder.glob("index/*/*/added_*.faissindex")
    index = VectorIndex.load(path)
    queries = np.random.default_rng(1).standard_normal((_QUERIES, _WIDTH), dtype=np.float32)
    return _typical(lambda: index.search(queries, project.config.num_neighbors_query))


def _exact_search_of(num_vectors: int, metric: str) -> Spent:
    """Of the queries that measure the recall, in as many vectors."""
    vectors = np.random.default_rng(2).standard_normal((num_vectors, _WIDTH), dtype=np.float32)
    return _typical(lambda: exact_search(vectors[:NUM_QUERIES], vectors, RECALL_AT + 1, metric))


def _typical(function: Callable[[], object]) -> Spent:
    function()
    found = [_spent(function) for _ in range(_REPEATS)]
    return Spent(median(spent.wall for spent in found), median(spent.cpu for spent in found))


def _embed(embedder: Embedder, texts: list[str]) -> tuple[np.ndarray, Spent]:
    """Vectors of as many texts as a few seconds allow, and what one took. They are given at once, since an embedder
    sorts what it is given by length, and twice, since what it makes for each shape of a batch serves a whole build."""
    few = texts[:_EMBED_AT_A_TIME]
    embedder.embed(few)
    warm = _spent(lambda: embedder.embed(few)).times(1 / len(few))
    count = max(_EMBED_AT_A_TIME, int(_EMBED_SECONDS / max(warm.wall, 1e-9)))
    most, parts = texts[:count], list[np.ndarray]()
    embedder.embed(most)
    spent = _spent(lambda: parts.append(embedder.embed(most)))
    return parts[0], spent.times(1 / len(most))


def vectors_around(vectors_ND: np.ndarray, num_train: int) -> np.ndarray:
    """More vectors, each near one of those that are given: enough to compare, and to train codes on as many as
    ``num_train``."""
    count = max(_VECTORS, min(num_train, _LEARNT_FROM))
    random = np.random.default_rng(0)
    chosen = vectors_ND[random.integers(0, len(vectors_ND), count)]
    spread = 0.3 * vectors_ND.std(axis=0)
    return (chosen + spread * random.standard_normal(chosen.shape, dtype=np.float32)).astype(np.float32)


def measure_vectors(
    rates: Rates,
    every_ND: np.ndarray,
    searched_ND: np.ndarray,
    factory: str,
    config: RetroDbConfig,
    num_chunks: int,
) -> None:
    """Fill in what depends on the embedder's channels: codes are trained on ``every_ND``, of which some are compared,
    and ``searched_ND`` are searched, in lists of the length that those of the index will have."""
    vectors_ND = every_ND[:_VECTORS]
    metric, queries = config.metric, vectors_ND[:_QUERIES]
    rates.compare = _typical(lambda: exact_search(queries, vectors_ND, RECALL_AT + 1, metric)).times(
        1 / (_QUERIES * vectors_ND.size)
    )
    asked = vectors_ND[:ROWS_OF_PART]
    rates.assign = _typical(lambda: nearest_centres(asked, vectors_ND, metric)).times(
        1 / (len(asked) * vectors_ND.size)
    )
    codes, lists = factory.split(",")[-1], lists_of(factory)
    width = min(width_of(factory, vectors_ND.shape[1]), vectors_ND.shape[1])
    few, inner, sample = (np.ascontiguousarray(each[:, :width]) for each in (vectors_ND, searched_ND, every_ND))
    small, visited, trains = codes, 0, Spent()
    if lists is not None:
        centres = min(_CENTRES, len(few))
        rates.cluster = _spent(lambda: VectorIndex.train(f"IVF{centres},Flat", metric, few)).times(
            1 / (ITERATIONS * centres * min(len(few), POINTS_PER_LIST * centres) * width)
        )
        length = min(max(num_chunks / lists, _SHORTEST), len(inner) / 16)
        count = max(1, int(len(inner) / length))
        small, visited = f"IVF{count},{codes}", min(count, nprobe_of(config, lists))
        trains = rates.cluster.times(ITERATIONS * count * min(len(sample), POINTS_PER_LIST * count) * width)
    trained: list[VectorIndex] = []
    learnt = _spent(lambda: trained.append(VectorIndex.train(small, metric, sample))) - trains
    rates.learn = learnt.times(1 / len(sample))
    index = trained[0]
    finding = rates.compare.times(index.num_lists * width if lists is not None else 0)
    rates.encode = (_typical(lambda: index.encode(few)).times(1 / len(few)) - finding).times(1)
    encoded, compared, spent = index.encode(inner), [0.0], [Spent()]
    # What a query costs beside comparing is the same whatever is compared. Two searches tell them apart, the larger of
    # which compares as many as the one that will be made, as far as these vectors reach.
    if lists is None:
        quarter = len(inner) // 4
        for first, last in ((0, quarter), (quarter, len(inner))):
            index.add_codes(encoded[first:last], np.arange(first, last))
            compared.append(last)
            spent.append(_typical(lambda: index.search(inner[:_QUERIES], config.num_neighbors_query)))
    else:
        index.add_codes(encoded, np.arange(len(inner)))
        for nprobe in sorted({visited // 4, visited} - {0}):
            index.set_search(nprobe, None)
            compared.append(len(inner) * nprobe / index.num_lists)
            spent.append(_typical(lambda: index.search(inner[:_QUERIES], config.num_neighbors_query)))
    rates.scan = (spent[-1] - spent[-2]).times(1 / (_QUERIES * (compared[-1] - compared[-2])))
    rates.ask = (spent[-1].times(1 / _QUERIES) - rates.scan.times(compared[-1]) - finding).times(1)
