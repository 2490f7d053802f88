"""The index of a database: trained on a random sample, filled by all processes, and measured against exact search."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from megatron_grit.data.block_files import Arrays, Block, BlockFolder, digest_of_settings, read_arrays, write_arrays
from megatron_grit.data.chunk_db import ChunkDb
from megatron_grit.data.retro_project import Project
from megatron_grit.errors import ConfigError, DataError
from megatron_grit.files import write_json
from megatron_grit.parallel.logs import get_logger
from megatron_grit.retrieval.embed import Embedder
from megatron_grit.retrieval.faiss_index import (
    IndexManifest,
    ShardedIndex,
    VectorIndex,
    choose_factory,
    exact_search,
    lists_of,
    merge_nearest,
    num_training_vectors,
    read_manifest,
)
from megatron_grit.retrieval.work import Worker, compute_blocks

log = get_logger(__name__)

NUM_RECALL_QUERIES = 1000
RECALL_AT = 10


@dataclass(kw_only=True)
class SearchSettings:
    """How an index is searched, and what that finds, as ``search.json`` beside it says."""

    nprobe: int | None
    ef_search: int | None
    recall: float
    """Share of the exact nearest neighbors that a search finds, over queries that chose nothing."""
    recall_low: float
    recall_high: float
    """95% confidence interval, by bootstrap over queries."""
    recall_at: int
    num_queries: int


class IndexFiles:
    """Where the index of a project is, and what it follows from.

    Args:
        project: the database.
        db: its chunks.
        embedder: fingerprint of what embeds them.
    """

    def __init__(self, project: Project, db: ChunkDb, embedder: str, dim: int) -> None:
        config = project.config
        self.config, self.embedder = config, embedder
        self.chunks = chunks_fingerprint(project)
        factory = config.index
        if factory == "auto":
            factory = choose_factory(len(db), dim, config.index_memory_gb * 2**30)
        self.factory = factory
        self.num_train = num_training_vectors(factory, len(db)) if config.ntrain is None else config.ntrain
        if self.num_train > len(db):
            raise ConfigError(f"ntrain {self.num_train:,} is above the {len(db):,} chunks of the database")
        lists = lists_of(factory)
        if lists is not None and self.num_train * config.train_load_fraction < lists:
            raise ConfigError(
                f"ntrain {self.num_train:,} x train_load_fraction {config.train_load_fraction} is below the {lists} "
                f"lists of index {factory}; raise ntrain or take fewer lists"
            )
        self.root = project.folder / "index"
        self.folder = self.root / "faiss-par-add" / factory.replace("/", "_")
        self.trained = self.folder / f"empty_{config.train_load_fraction:.3f}.faissindex"
        name = f"added_{config.train_load_fraction:.3f}_{config.add_load_fraction:.3f}"
        count = config.num_shards
        self.added = [
            self.folder / (f"{name}.faissindex" if count == 1 else f"{name}_{shard:03d}of{count:03d}.faissindex")
            for shard in range(count)
        ]
        self.search = self.folder / "search.json"

    def sample(self, num_chunks: int) -> np.ndarray:
        """Ids of the chunks that the index is trained on, at random, ascending."""
        chosen = np.random.default_rng(self.config.seed).choice(num_chunks, self.num_train, replace=False)
        return np.sort(chosen).astype(np.int64)

    def queries(self, num_chunks: int) -> np.ndarray:
        """Ids of the chunks whose neighbors measure the recall, at random, in random order."""
        count = min(NUM_RECALL_QUERIES, num_chunks)
        return np.random.default_rng([self.config.seed, 1]).choice(num_chunks, count, replace=False).astype(np.int64)


def chunks_fingerprint(project: Project) -> str:
    """Of the chunks of a database: what they were cut from and how."""
    infos = [dataclasses.asdict(info) for info in project.infos()]
    names = ("chunk_length", "min_chunk_tokens", "duplicates", "near_threshold", "valid_fraction", "seed")
    settings = {name: getattr(project.config, name) for name in names}
    return digest_of_settings({"infos": infos, "tokenizer": project.tokenizer.fingerprint} | settings)


def train_index(project: Project, worker: Worker, embedder: Embedder) -> None:
    """The stage index-train. All processes call it.

    Raises:
        ConfigError: an index that cannot be made of this database.
    """
    db = ChunkDb(project)
    files = IndexFiles(project, db, embedder.fingerprint, embedder.dim)
    if _is_done(files.trained, files):
        return
    sample = files.sample(len(db))
    if worker.is_first:
        write_arrays(project.merged / "sampled.hdf5", {"chunks": db.rows[sample]}, files.chunks)
    signature = {"task": "train_emb", "chunks": files.chunks, "embedder": files.embedder, "ntrain": files.num_train}
    blocks = BlockFolder(files.root / "train_emb" / "blocks", len(sample), project.config.block_size, signature)

    def compute(block: Block) -> Arrays:
        return {"data": embedder.embed(db.texts(sample[block.start : block.stop]))}

    compute_blocks(blocks, compute, worker, "embeddings to train on")
    if worker.is_first:
        log.info(f"index {files.factory}: trained on {files.num_train:,} of {len(db):,} chunks")
        fraction = project.config.train_load_fraction
        parts = [blocks.read(block)["data"][: math.ceil(fraction * len(block))] for block in blocks.blocks]
        vectors = np.concatenate(parts) if parts else np.empty((0, embedder.dim), np.float32)
        index = VectorIndex.train(files.factory, project.config.metric, vectors)
        index.save(files.trained, _manifest(files, index, 0, len(vectors)))
        if not project.config.keep_embeddings:
            _remove_blocks(blocks)
    worker.barrier()


def add_to_index(project: Project, worker: Worker, embedder: Embedder) -> None:
    """The stage index-add: codes by all processes, joined in the order of the chunks by one.

    Raises:
        DataError: the trained index is missing, damaged or of another embedder.
    """
    db = ChunkDb(project)
    files = IndexFiles(project, db, embedder.fingerprint, embedder.dim)
    if files.search.is_file() and all(_is_done(path, files) for path in files.added):
        return
    trained = VectorIndex.load(files.trained, embedder=files.embedder, chunks=files.chunks)
    query_ids = files.queries(len(db))
    queries = _query_vectors(files, db, query_ids, worker, embedder)
    blocks = _code_blocks(files, len(db))
    metric, fraction = project.config.metric, project.config.add_load_fraction

    def compute(block: Block) -> Arrays:
        count = math.ceil(fraction * len(block))
        vectors = embedder.embed(db.texts(np.arange(block.start, block.start + count)))
        scores, places = exact_search(queries, vectors, RECALL_AT + 1, metric)
        return {"codes": trained.encode(vectors), "exact_scores": scores, "exact_ids": places + block.start}

    compute_blocks(blocks, compute, worker, "codes")
    if worker.is_first:
        _join(files, blocks, len(db))
        exact = _exact_neighbors(blocks, query_ids, metric)
        settings = choose_search(ShardedIndex.load(files.added), project.config, queries, query_ids, exact)
        write_json(files.search, dataclasses.asdict(settings))
        log.info(
            f"recall@{settings.recall_at} against exact search: {settings.recall:.3f} "
            f"({settings.recall_low:.3f} to {settings.recall_high:.3f}, {settings.num_queries} queries) with nprobe "
            f"{settings.nprobe}, ef_search {settings.ef_search}"
        )
        if not project.config.keep_embeddings:
            _remove_blocks(blocks)
    worker.barrier()


def _code_blocks(files: IndexFiles, num_chunks: int) -> BlockFolder:
    signature = {
        "task": "add_codes",
        "trained": read_manifest(files.trained).sha256,
        "embedder": files.embedder,
        "chunks": files.chunks,
        "add_load_fraction": files.config.add_load_fraction,
    }
    return BlockFolder(files.folder / "add_codes", num_chunks, files.config.block_size, signature)


def _query_vectors(files: IndexFiles, db: ChunkDb, ids: np.ndarray, worker: Worker, embedder: Embedder) -> np.ndarray:
    path = files.root / "recall_queries.hdf5"
    if worker.is_first:
        write_arrays(path, {"ids": ids, "data": embedder.embed(db.texts(ids))}, files.embedder)
    worker.barrier()
    return read_arrays(path)["data"]


def _join(files: IndexFiles, blocks: BlockFolder, num_chunks: int) -> None:
    """Fill the index, or each of its shards with a run of blocks."""
    count = len(files.added)
    with tqdm(total=num_chunks, unit="chunk", unit_scale=True, desc="index") as bar:
        for shard, path in enumerate(files.added):
            index = VectorIndex.load(files.trained)
            for block in blocks.blocks[shard * len(blocks.blocks) // count : (shard + 1) * len(blocks.blocks) // count]:
                codes = blocks.read(block)["codes"]
                index.add_codes(codes, np.arange(block.start, block.start + len(codes)))
                bar.update(len(block))
            index.save(path, _manifest(files, index, len(index), read_manifest(files.trained).num_trained))


def _exact_neighbors(blocks: BlockFolder, query_ids: np.ndarray, metric: str) -> np.ndarray:
    """The exact nearest chunks of each query, itself left out: int64 [Q, RECALL_AT], -1 where there are fewer."""
    best: tuple[np.ndarray, np.ndarray] | None = None
    for block in blocks.blocks:
        arrays = blocks.read(block, "exact_scores", "exact_ids")
        part = arrays["exact_scores"], arrays["exact_ids"]
        best = merge_nearest([part] if best is None else [best, part], RECALL_AT + 1, metric)
    assert best is not None
    return without_own(best[1], query_ids, RECALL_AT)


def without_own(ids_QK: np.ndarray, own_Q: np.ndarray, k: int) -> np.ndarray:
    """The first ``k`` of each row that are not its own id; -1 where there are fewer."""
    keep = (ids_QK != own_Q[:, None]) & (ids_QK >= 0)
    order = np.argsort(~keep, axis=1, kind="stable")[:, :k]
    found = np.where(np.take_along_axis(keep, order, 1), np.take_along_axis(ids_QK, order, 1), -1)
    return np.pad(found, ((0, 0), (0, k - found.shape[1])), constant_values=-1)


def recall_of(found_QK: np.ndarray, exact_QK: np.ndarray) -> np.ndarray:
    """Share of each query's exact neighbors that were found, float64 [Q]."""
    hits = ((exact_QK[:, :, None] == found_QK[:, None, :]) & (exact_QK[:, :, None] >= 0)).any(2).sum(1)
    return hits / np.maximum((exact_QK >= 0).sum(1), 1)


def choose_search(
    index: ShardedIndex, config: Any, queries: np.ndarray, query_ids: np.ndarray, exact: np.ndarray
) -> SearchSettings:
    """The least thorough search that reaches the wanted recall on half of the queries, measured on the other half.

    Args:
        index: the index.
        config: of the database: recall, nprobe and ef_search.
        queries: float32 [Q, D].
        query_ids: their own ids, which do not count as found.
        exact: of :func:`_exact_neighbors`.
    """

    def recalls(part: slice, nprobe: int | None, ef_search: int | None) -> np.ndarray:
        index.set_search(nprobe, ef_search)
        _, ids = index.search(queries[part], RECALL_AT + 1)
        return recall_of(without_own(ids, query_ids[part], RECALL_AT), exact[part])

    half = len(queries) // 2
    chosen, other = slice(0, half), slice(half, len(queries))
    nprobe, ef_search = config.nprobe, config.ef_search
    if nprobe is None and index.num_lists > 1:
        nprobe = 1
        while nprobe < index.num_lists:
            if recalls(chosen, nprobe, ef_search or 2 * nprobe).mean() >= config.recall:
                break
            nprobe = min(2 * nprobe, index.num_lists)
    if ef_search is None and "HNSW" in index.factory:
        ef_search = max(2 * (nprobe or 32), 32)
    values = recalls(other, nprobe, ef_search)
    rng = np.random.default_rng(config.seed)
    means = values[rng.integers(0, len(values), (1000, len(values)))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return SearchSettings(
        nprobe=nprobe,
        ef_search=ef_search,
        recall=float(values.mean()),
        recall_low=float(low),
        recall_high=float(high),
        recall_at=RECALL_AT,
        num_queries=len(values),
    )


def read_search(path: Path) -> SearchSettings:
    """The ``search.json`` of an index.

    Raises:
        DataError: it is missing or cannot be read.
    """
    if not path.is_file():
        raise DataError("is missing; run the task index-add", path=path)
    try:
        return SearchSettings(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise DataError(f"cannot be read ({error}); run the task index-add again", path=path) from None


def _manifest(files: IndexFiles, index: VectorIndex, num_vectors: int, num_trained: int) -> IndexManifest:
    return IndexManifest(
        factory=files.factory,
        metric=index.metric,
        dim=index.dim,
        embedder=files.embedder,
        chunks=files.chunks,
        num_trained=num_trained,
        num_vectors=num_vectors,
    )


def _is_done(path: Path, files: IndexFiles) -> bool:
    """Whether an index file is there and is of this embedder, these chunks and this factory string."""
    if not path.is_file() or not path.with_suffix(".json").is_file():
        return False
    try:
        found = read_manifest(path)
    except DataError:
        return False
    same = (found.factory, found.embedder, found.chunks) == (files.factory, files.embedder, files.chunks)
    return same and path.stat().st_size == found.bytes


def _remove_blocks(blocks: BlockFolder) -> None:
    for block in blocks.blocks:
        block.path.unlink(missing_ok=True)
