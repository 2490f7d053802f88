"""The index of a database: trained on a random sample, filled by all processes, and measured against exact search."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from megatron_grit.config.database.schema import RetroDbConfig
from megatron_grit.data.chunks.chunk_db import DATASET, ChunkDb, map_dataset
from megatron_grit.data.chunks.project import Project
from megatron_grit.data.order.permutation import derive_keys, permute
from megatron_grit.errors import ConfigError, DataError
from megatron_grit.inference.encoders.protocol import Embedder
from megatron_grit.retrieval.index.factory import choose_factory, lists_of, num_training_vectors
from megatron_grit.retrieval.index.faiss_index import VectorIndex, exact_search, new_index
from megatron_grit.retrieval.index.manifest import IndexManifest, is_whole, read_manifest
from megatron_grit.retrieval.index.recall import RECALL_AT, SearchSettings, choose_search, without_own
from megatron_grit.retrieval.index.recall_queries import RecallQueries
from megatron_grit.retrieval.index.search import ShardedIndex, merge_nearest
from megatron_grit.retrieval.stages.vectors import ChunkVectors, chunks_fingerprint, open_vectors
from megatron_grit.retrieval.stages.work import Worker, compute_blocks
from megatron_grit.store.blocks import (
    Arrays,
    Block,
    BlockFolder,
    read_arrays,
    signature_of,
    write_arrays,
)
from megatron_grit.store.digest import digest_of_settings
from megatron_grit.store.files import write_json
from megatron_grit.store.logs import get_logger
from megatron_grit.store.progress import Progress

log = get_logger(__name__)

_TOLERANCE = 0.005
"""Recall below the wanted one that is not worth a warning."""


def check_index(config: RetroDbConfig, dim: int, num_chunks: int, *, at_most: bool = False) -> tuple[str, int]:
    """The factory string of a database's index, and how many chunks it is trained on.

    Args:
        config: of the database.
        dim: channels of a vector.
        num_chunks: of the database.
        at_most: they may be fewer, so that only what is wrong with any such number is refused; index auto then stays
            auto.

    Raises:
        ConfigError: an index that cannot be made of such a database.
    """
    factory = config.index
    there = f"{'at most ' if at_most else ''}{num_chunks:,} chunks of the database"
    if config.ntrain is not None and config.ntrain > num_chunks:
        raise ConfigError(f"ntrain {config.ntrain:,} is above the {there}; lower it")
    if config.num_shards > num_chunks:
        raise ConfigError(f"num_shards {config.num_shards} is above the {there}; lower it")
    if factory == "auto":
        if at_most:
            return factory, 0
        factory = choose_factory(num_chunks, dim, config.index_memory_gb * 2**30)
    new_index(factory, config.metric, dim)
    num_train = num_training_vectors(factory, num_chunks) if config.ntrain is None else config.ntrain
    lists = lists_of(factory)
    if lists is None and config.add_load_fraction < 1:
        raise ConfigError(f"index {factory} holds no ids; set add_load_fraction to 1, or give one with lists (IVF...)")
    if lists is not None and num_train * config.train_load_fraction < lists:
        raise ConfigError(
            f"ntrain {num_train:,} x train_load_fraction {config.train_load_fraction} is below the {lists} lists of "
            f"index {factory}; raise ntrain or take fewer lists"
        )
    return factory, num_train


class IndexFiles:
    """Where the index of a project is, and what it follows from.

    Args:
        project: the database.
        db: its chunks.
        embedder: fingerprint of what embeds them.
        dim: channels of a vector.

    Raises:
        ConfigError: an index that cannot be made of this database.
    """

    def __init__(self, project: Project, db: ChunkDb, embedder: str, dim: int) -> None:
        config = project.config
        self.config, self.embedder = config, embedder
        self.chunks = chunks_fingerprint(project)
        factory, self.num_train = check_index(config, dim, len(db))
        self.factory = factory
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
        self.queries = RecallQueries(project, self.chunks, embedder)
        self.exact = self.folder / "exact_neighbors.hdf5"
        self.training = digest_of_settings(
            {
                "chunks": self.chunks,
                "embedder": embedder,
                "dtype": config.embedding_dtype,
                "factory": factory,
                "metric": config.metric,
                "ntrain": self.num_train,
                "train_load_fraction": config.train_load_fraction,
                "seed": config.seed,
            }
        )
        """Of all that the trained index follows from."""

    def sample(self, num_chunks: int) -> np.ndarray:
        """Ids of the chunks that the index is trained on, at random, ascending: int64 [num_train]."""
        return np.sort(permute(np.arange(self.num_train), num_chunks, derive_keys(0, self.config.seed)))

    def adding(self) -> str:
        """Of all that the filled index follows from.

        Raises:
            DataError: there is no trained index.
        """
        # The file alone does not tell embedders apart: an index that needs no training is the same for all.
        trained, fraction = read_manifest(self.trained).sha256, self.config.add_load_fraction
        settings = {"trained": trained, "training": self.training, "fraction": fraction}
        return digest_of_settings(settings | {"chunks": self.chunks, "shards": len(self.added)})


def train_index(project: Project, worker: Worker, embedder: Embedder) -> None:
    """The stage index-train. All processes call it.

    Raises:
        ConfigError: an index that cannot be made of this database.
    """
    db = ChunkDb(project)
    files = IndexFiles(project, db, embedder.fingerprint, embedder.dim)
    if worker.from_first(lambda: _is_done(files.trained, files.training)):
        # The list of datasets may have been made anew since.
        counted = any(info.n_chunks_sampled for info in db.infos)
        if worker.is_first and not counted and signature_of(_sample_file(project)) == files.training:
            _count_sample(project)
        _clear(worker, project, _sample_blocks(project, files))
        return
    files.queries.source()  # known before days of training
    vectors = open_vectors(project, worker, embedder)
    if worker.is_first:
        if signature_of(_sample_file(project)) != files.training:
            ids = files.sample(len(db))
            write_arrays(_sample_file(project), {"chunks": db.rows[ids], "ids": ids}, files.training)
        _count_sample(project)
    worker.barrier()
    blocks, compute = recompute_sample(project, files, vectors)
    if not vectors.stored:
        compute_blocks(blocks, compute, worker, "embeddings to train on")
    if worker.is_first:
        log.info(f"index {files.factory}: training on {files.num_train:,} of {len(db):,} chunks")
        count = math.ceil(project.config.train_load_fraction * files.num_train)
        if vectors.stored:
            sample = vectors.of(map_dataset(_sample_file(project), "ids")[:count])
        else:
            sample = np.empty((count, embedder.dim), dtype=np.float32)
            for block in blocks.blocks:
                part = sample[block.start : block.stop]
                part[:] = blocks.read(block)["data"][: len(part)]
        # The other processes wait, and torchrun gave each of them one thread.
        threads = len(os.sched_getaffinity(0)) if worker.world_size > 1 else None
        index = VectorIndex.train(files.factory, project.config.metric, sample, num_threads=threads)
        index.save(files.trained, _manifest(files, index, count, files.training))
    _clear(worker, project, blocks)


def _sample_file(project: Project) -> Path:
    return project.merged / "sampled.hdf5"


def _count_sample(project: Project) -> None:
    """Write how many chunks of each dataset are in the sample, as Retro's tools do."""
    infos = project.infos()
    datasets = map_dataset(_sample_file(project), "chunks")[:, DATASET].astype(np.int64)
    for info, count in zip(infos, np.bincount(datasets, minlength=len(infos)).tolist(), strict=True):
        info.n_chunks_sampled = count
    project.save_infos(infos)


def _sample_blocks(project: Project, files: IndexFiles) -> BlockFolder:
    return BlockFolder(
        files.root / "train_emb" / "blocks",
        files.num_train,
        project.config.block_size,
        {"task": "train_emb", "training": files.training},
    )


def recompute_sample(
    project: Project, files: IndexFiles, vectors: ChunkVectors
) -> tuple[BlockFolder, Callable[[Block], Arrays]]:
    """The blocks of the training sample's embeddings, and what makes one again."""

    def compute(block: Block) -> Arrays:
        return {"data": vectors.of(map_dataset(_sample_file(project), "ids")[block.start : block.stop])}

    return _sample_blocks(project, files), compute


def add_to_index(project: Project, worker: Worker, embedder: Embedder) -> None:
    """The stage index-add: codes by all processes, joined in the order of the chunks; then the recall, if it is not
    known for these settings of the search. All processes call it.

    Raises:
        DataError: the trained index is missing, damaged or of another embedder.
    """
    db = ChunkDb(project)
    files = IndexFiles(project, db, embedder.fingerprint, embedder.dim)
    trained = VectorIndex.load(files.trained, embedder=files.embedder, chunks=files.chunks)
    if read_manifest(files.trained).signature != files.training:
        raise DataError(
            "was trained with other settings; build it again with --overwrite index-train", path=files.trained
        )
    adding = files.adding()
    vectors = open_vectors(project, worker, embedder)
    is_added = worker.from_first(lambda: _is_added(files, adding))
    if not is_added:
        files.queries.prepare(vectors, worker)
    blocks, compute = recompute_codes(project, files, vectors, trained)
    if not is_added:
        compute_blocks(blocks, compute, worker, "codes")
        if worker.is_first:
            exact = _exact_neighbors(blocks, files.queries.read()[0], project.config.metric)
            write_arrays(files.exact, {"exact": exact}, adding)
        _join(files, blocks, len(db), adding, worker)
    if worker.is_first:
        measure_search(files)
    _clear(worker, project, blocks)


def recompute_codes(
    project: Project, files: IndexFiles, vectors: ChunkVectors, trained: VectorIndex
) -> tuple[BlockFolder, Callable[[Block], Arrays]]:
    """The blocks of codes, and what makes one again.

    Raises:
        DataError: the trained index is missing.
    """
    metric, fraction = project.config.metric, project.config.add_load_fraction
    queries: list[np.ndarray] = []

    def compute(block: Block) -> Arrays:
        if not queries:
            queries.append(files.queries.read()[1])
        part = vectors.of_block(block, math.ceil(fraction * len(block)))
        scores, places = exact_search(queries[0], part, RECALL_AT + 1, metric)
        return {"codes": trained.encode(part), "exact_scores": scores, "exact_ids": places + block.start}

    # Those that were drawn: query_paths may be others by now.
    signature = {"task": "add_codes", "adding": files.adding(), "queries": files.queries.drawn.signature}
    folder = files.folder / "add_codes"
    return BlockFolder(folder, len(vectors.db), project.config.block_size, signature), compute


def _is_added(files: IndexFiles, adding: str) -> bool:
    return all(_is_done(path, adding) for path in files.added) and signature_of(files.exact) == adding


def _join(files: IndexFiles, blocks: BlockFolder, num_chunks: int, adding: str, worker: Worker) -> None:
    """Fill the index, or each of its shards with a run of chunks. Where processes will each hold some of the shards,
    they fill them at the same time, spread over nodes; else one process does, a shard at a time."""
    count, size = len(files.added), blocks.block_size
    bounds = [shard * num_chunks // count for shard in range(count + 1)]
    fillers = worker.world_size if files.config.index_placement == "spread" else 1
    mine = [shard for shard in range(count) if shard * fillers // count == worker.rank]
    mine = [shard for shard in mine if not _is_done(files.added[shard], adding)]
    num_trained = read_manifest(files.trained).num_trained
    total = sum(bounds[shard + 1] - bounds[shard] for shard in mine)
    with Progress(total, "index", "chunk", enabled=worker.is_first) as bar:
        for shard in mine:
            path, first, last = files.added[shard], bounds[shard], bounds[shard + 1]
            index = VectorIndex.load(files.trained)
            for block in blocks.blocks[first // size : -(-last // size)]:
                begin, end = max(first, block.start) - block.start, min(last, block.stop) - block.start
                codes = blocks.read(block)["codes"][begin:end]
                index.add_codes(codes, np.arange(len(codes)) + block.start + begin)
                bar.update(end - begin)
            index.save(path, _manifest(files, index, num_trained, adding))
    worker.barrier()


def _exact_neighbors(blocks: BlockFolder, query_ids: np.ndarray, metric: str) -> np.ndarray:
    """The exact nearest chunks of each query, itself left out: int64 [Q, RECALL_AT], -1 where there are fewer."""
    best: tuple[np.ndarray, np.ndarray] | None = None
    for block in blocks.blocks:
        arrays = blocks.read(block, "exact_scores", "exact_ids")
        part = arrays["exact_scores"], arrays["exact_ids"]
        best = merge_nearest([part] if best is None else [best, part], RECALL_AT + 1, metric)
    assert best is not None
    return without_own(best[1], query_ids, RECALL_AT)


def measure_search(files: IndexFiles) -> SearchSettings:
    """Choose how the index is searched and measure what that finds, unless it is known. In one process."""
    config = files.config
    digests = [read_manifest(path).sha256 for path in files.added]
    wanted = {"nprobe": config.nprobe, "ef_search": config.ef_search, "recall": config.recall}
    signature = digest_of_settings({"index": digests, **wanted})
    try:
        known = read_search(files.search)
        if known.signature == signature:
            return known
    except DataError:  # missing or damaged
        pass
    query_ids, queries = files.queries.read()
    exact = read_arrays(files.exact)["exact"]
    index = ShardedIndex.load(files.added, mapped=True, embedder=files.embedder, chunks=files.chunks)
    settings = choose_search(index, config, queries, query_ids, exact)
    drawn = files.queries.drawn
    settings = dataclasses.replace(
        settings, signature=signature, queries=drawn.source, query_instruction=drawn.query_instruction
    )
    write_json(files.search, dataclasses.asdict(settings))
    log.info(
        f"recall@{settings.recall_at} against exact search: {settings.recall:.3f} "
        f"({settings.recall_low:.3f} to {settings.recall_high:.3f}, {settings.num_queries:,} {settings.queries}) with "
        f"nprobe {settings.nprobe}, ef_search {settings.ef_search}"
    )
    if config.nprobe is None and settings.recall < config.recall - _TOLERANCE:
        _warn_of_recall(files, settings, index.num_lists)
    return settings


def _warn_of_recall(files: IndexFiles, settings: SearchSettings, num_lists: int) -> None:
    wanted = files.config.recall
    found = (
        f"index {files.factory} finds {settings.recall:.3f} of the nearest neighbors, not the wanted recall {wanted}"
    )
    if settings.nprobe is not None and settings.nprobe < num_lists and settings.most_recall is None:
        log.warning(f"{found}, which the queries that chose nprobe {settings.nprobe} had; set nprobe higher")
        return
    if settings.most_nprobe in (None, num_lists):
        found += ", even where all of it is searched"
    else:
        found += f", even with nprobe {settings.most_nprobe:,}"
    if settings.most_recall is not None:
        found += f" ({settings.most_recall:.3f})"
    remedy = "raise index_memory_gb" if files.config.index == "auto" else "give an index with longer codes, or auto"
    log.warning(f"{found}: its codes are too coarse; {remedy} and build it again with --overwrite index-train")


def read_search(path: Path) -> SearchSettings:
    """The ``search.json`` of an index.

    Raises:
        DataError: it is missing or cannot be read.
    """
    if not path.is_file():
        raise DataError("is missing; run the task index-add", path=path)
    try:
        return SearchSettings(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"cannot be read ({error}); run the task index-add again", path=path) from None


def _manifest(files: IndexFiles, index: VectorIndex, num_trained: int, signature: str) -> IndexManifest:
    return IndexManifest(
        factory=files.factory,
        metric=index.metric,
        dim=index.dim,
        embedder=files.embedder,
        chunks=files.chunks,
        num_trained=num_trained,
        num_vectors=len(index),
        signature=signature,
    )


def _is_done(path: Path, signature: str) -> bool:
    """Whether an index file is whole and of these settings."""
    try:
        manifest = read_manifest(path)
    except DataError:
        return False
    return manifest.signature == signature and is_whole(path, manifest)


def _clear(worker: Worker, project: Project, blocks: BlockFolder) -> None:
    """Remove blocks that nothing reads again, those of a run that was killed here included."""
    if worker.is_first and not project.config.keep_embeddings:
        blocks.remove()
    worker.barrier()
