"""The task index-train: the index without vectors, trained on a random sample of the chunks."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from megatron_grit.data.chunks.chunk_db import DATASET, ChunkDb, map_dataset
from megatron_grit.data.chunks.project import Project
from megatron_grit.data.chunks.versions import built_chunks
from megatron_grit.errors import DataError
from megatron_grit.inference.encoders.protocol import Embedder
from megatron_grit.retrieval.database.index_files import IndexFiles, check_index, is_finished
from megatron_grit.retrieval.database.vectors import ChunkVectors, open_vectors
from megatron_grit.retrieval.index.factory import index_bytes
from megatron_grit.retrieval.index.faiss_index import VectorIndex
from megatron_grit.retrieval.index.recall_queries import RecallQuestions
from megatron_grit.retrieval.index.sizing import too_coarse
from megatron_grit.retrieval.stages.task import EMBEDDER_SETTINGS, WARNING, Inputs, Job, Task
from megatron_grit.retrieval.work import Check, Worker, compute_blocks
from megatron_grit.store.blocks import Arrays, Block, BlockFolder, signature_of, write_arrays
from megatron_grit.store.logs import get_logger

log = get_logger(__name__)

_REMEDY = "run --tasks index-train"


class IndexTrain(Task):
    """Trains the index on a random sample of the chunks."""

    name = "index-train"
    makes_versions = True
    settings = (*EMBEDDER_SETTINGS, "index", "metric", "ntrain", "train_load_fraction", "index_memory_gb")
    voids = ("index-add",)
    makes = ("index",)
    trace = "index/*/*/empty_*.json"

    def check(self, inputs: Inputs) -> Iterator[str]:
        return check_index_of(inputs)

    def run(self, job: Job) -> None:
        train_index(job.project, job.worker, job.embedder)

    def validate(self, job: Job) -> Iterator[Check]:
        db = built_chunks(job.project)
        files = IndexFiles(job.project, db, job.embedder.fingerprint, job.embedder.dim)
        yield sample_blocks(job.project, files, open_vectors(job.project, job.worker, job.embedder, db))


def check_index_of(inputs: Inputs) -> Iterator[str]:
    """See whether the index of the configuration can be made: a line about it, where it is to be made."""
    if inputs.project.config.recall_queries is not None:
        RecallQuestions(inputs.project, "")
    yield from index_line(inputs)


def index_line(inputs: Inputs) -> Iterator[str]:
    """A line about the index that is to be made of the chunks, or of as many as there may be.

    Raises:
        ConfigError: it cannot be made of them.
    """
    if inputs.embedder is None or inputs.is_grown:
        return
    count, at_most = _num_chunks(inputs)
    factory, num_train = check_index(inputs.project.config, inputs.embedder.dim, count, at_most=at_most)
    trained = f", trained on {num_train:,}" if num_train else ""
    config = inputs.project.config
    if factory == "auto":
        yield "index: auto, chosen when the number of chunks is known"
    else:
        gigabytes = index_bytes(factory, inputs.embedder.dim, count) / 2**30
        few = "at most " if at_most else ""
        yield f"index: {factory} of {few}{count:,} chunks{trained}, {few}{gigabytes:.3g} GiB to search"
        if gigabytes > config.index_memory_gb:
            yield (
                f"{WARNING}{gigabytes:.3g} GiB of index {factory} are above index_memory_gb, "
                f"{config.index_memory_gb:g}; give an index with shorter codes, set index_placement to spread on more "
                "machines, or raise index_memory_gb"
            )


def _num_chunks(inputs: Inputs) -> tuple[int, bool]:
    """Chunks of the database, and whether they may be fewer."""
    project = inputs.project
    if not inputs.rebuilds:
        try:
            return len(ChunkDb(project)), False
        except DataError:  # not built, or to be built again
            pass
    files = [project.open(prefix) for prefix in project.config.data_paths]
    length = project.config.chunk_length
    return sum(file.bin_bytes // file.dtype.itemsize // length + file.num_documents for file in files), True


def train_index(project: Project, worker: Worker, embedder: Embedder) -> None:
    """The stage index-train. All processes call it.

    Raises:
        ConfigError: an index that cannot be made of this database.
    """
    db = ChunkDb(project)
    files = IndexFiles(project, db, embedder.fingerprint, embedder.dim)
    if worker.from_first(lambda: is_finished(files.trained, files.training)):
        # The list of datasets may have been made anew since.
        counted = any(info.n_chunks_sampled for info in db.infos)
        if worker.is_first and not counted and signature_of(_sample_file(project)) == files.training:
            _count_sample(project)
        clear_blocks(worker, project, _sample_folder(project, files))
        return
    files.queries.source()  # known before days of training
    vectors = open_vectors(project, worker, embedder)
    if worker.is_first:
        if signature_of(_sample_file(project)) != files.training:
            ids = files.sample(len(db))
            write_arrays(_sample_file(project), {"chunks": db.rows[ids], "ids": ids}, files.training)
        _count_sample(project)
    worker.barrier()
    what, blocks, compute, _ = sample_blocks(project, files, vectors)
    if not vectors.stored:
        compute_blocks(blocks, compute, worker, what)
    if worker.is_first:
        log.info(f"index {files.factory}: training on {files.num_train:,} of {len(db):,} chunks")
        count = math.ceil(project.config.train_load_fraction * files.num_train)
        if vectors.stored:
            sample = vectors.of(map_dataset(_sample_file(project), "ids", _REMEDY)[:count])
        else:
            sample = np.empty((count, embedder.dim), dtype=np.float32)
            for block in blocks.blocks:
                part = sample[block.start : block.stop]
                part[:] = blocks.read(block)["data"][: len(part)]
        # The other processes wait, and torchrun gave each of them one thread.
        threads = len(os.sched_getaffinity(0)) if worker.world_size > 1 else None
        index = VectorIndex.train(files.factory, project.config.metric, sample, num_threads=threads)
        warning = too_coarse(index, sample, len(db), project.config.recall, is_auto=project.config.index == "auto")
        if warning is not None:  # known before all chunks are embedded
            log.warning(warning)
        index.save(files.trained, files.manifest(index, count, files.training))
    clear_blocks(worker, project, blocks)


def _sample_file(project: Project) -> Path:
    return project.merged / "sampled.hdf5"


def _count_sample(project: Project) -> None:
    """Write how many chunks of each dataset are in the sample, as Retro's tools do."""
    infos = project.infos()
    datasets = map_dataset(_sample_file(project), "chunks", _REMEDY)[:, DATASET].astype(np.int64)
    for info, count in zip(infos, np.bincount(datasets, minlength=len(infos)).tolist(), strict=True):
        info.n_chunks_sampled = count
    project.save_infos(infos)


def sample_blocks(project: Project, files: IndexFiles, vectors: ChunkVectors) -> Check:
    """The blocks of the training sample's embeddings, and what makes one."""

    def compute(block: Block) -> Arrays:
        return {"data": vectors.of(map_dataset(_sample_file(project), "ids", _REMEDY)[block.start : block.stop])}

    return Check("embeddings to train on", _sample_folder(project, files), compute)


def _sample_folder(project: Project, files: IndexFiles) -> BlockFolder:
    return BlockFolder(
        files.root / "train_emb" / "blocks",
        files.num_train,
        project.config.block_size,
        {"task": "train_emb", "training": files.training},
        _REMEDY,
    )


def clear_blocks(worker: Worker, project: Project, blocks: BlockFolder) -> None:
    """Remove blocks that nothing reads again, those of a run that was killed here included."""
    if worker.is_first and not project.config.keep_embeddings:
        blocks.remove()
    worker.barrier()
