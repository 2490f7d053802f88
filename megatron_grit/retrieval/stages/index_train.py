"""The task index-train: the index without vectors, trained on a random sample of the chunks."""

from __future__ import annotations

import functools
import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_grit.data.chunks.chunk_db import DATASET, ChunkDb, map_dataset
from megatron_grit.data.chunks.project import Project
from megatron_grit.data.chunks.versions import built_chunks
from megatron_grit.errors import DataError
from megatron_grit.inference.encoders.protocol import Embedder
from megatron_grit.retrieval.database.index_files import IndexFiles, check_index, is_finished
from megatron_grit.retrieval.database.vectors import ChunkVectors, open_vectors
from megatron_grit.retrieval.index.factory import index_bytes, lists_of
from megatron_grit.retrieval.index.faiss_index import VectorIndex
from megatron_grit.retrieval.index.kmeans import ITERATIONS, POINTS_PER_LIST, SHARED_LISTS, KMeans, share_of
from megatron_grit.retrieval.index.on_torch import nearest_centres
from megatron_grit.retrieval.index.recall_queries import RecallQuestions
from megatron_grit.retrieval.index.sizing import too_coarse
from megatron_grit.retrieval.stages.task import EMBEDDER_SETTINGS, WARNING, Inputs, Job, Task
from megatron_grit.retrieval.work import Check, Worker, compute_blocks
from megatron_grit.store.blocks import Arrays, Block, BlockFolder, signature_of, write_arrays
from megatron_grit.store.logs import get_logger

log = get_logger(__name__)

_REMEDY = "run --tasks index-train"
_MOST_FOR_CODES = 1 << 18
"""Vectors that rotations and codes are learned from, where lists are trained by all processes. What faiss draws of
them for its own clusterings is less, but for PCA of more than 256 channels."""


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
        if num_train and not factory.split(",")[-1].startswith(("Flat", "HNSW")):
            yield (
                f"index: whether such codes can reach recall {config.recall} is said by --tasks db-build,index-train, "
                f"which embeds {few}{num_train:,} chunks"
            )
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
        _clear(worker, project, files, _sample_folder(project, files))
        return
    files.queries.source()  # known before days of training
    _draw_sample(project, files, db, worker)
    if worker.is_first:
        _count_sample(project)
    worker.barrier()
    _train(project, worker, embedder, db, files)


def restore_trained(project: Project, worker: Worker, embedder: Embedder) -> None:
    """Train the index of a database to which documents were added again, if it is missing or damaged. All processes
    call it. What comes out is what was there, on a machine of the same kind; the caller compares."""
    db = built_chunks(project)
    files = IndexFiles(project, db, embedder.fingerprint, embedder.dim)
    if not worker.from_first(lambda: is_finished(files.trained, files.training)):
        _draw_sample(project, files, db, worker)
        _train(project, worker, embedder, db, files)


def _draw_sample(project: Project, files: IndexFiles, db: ChunkDb, worker: Worker) -> None:
    if worker.is_first and signature_of(_sample_file(project)) != files.training:
        ids = files.sample(len(db))
        write_arrays(_sample_file(project), {"chunks": db.rows[ids], "ids": ids}, files.training)
    worker.barrier()


def _train(project: Project, worker: Worker, embedder: Embedder, db: ChunkDb, files: IndexFiles) -> None:
    vectors = open_vectors(project, worker, embedder, db)
    what, blocks, compute, _ = sample_blocks(project, files, vectors)
    if not vectors.stored:
        compute_blocks(blocks, compute, worker, what)
    count = math.ceil(project.config.train_load_fraction * files.num_train)
    sample = _Sample(project, files, vectors, blocks, count)
    if worker.is_first:
        log.info(f"index {files.factory}: training on {files.num_train:,} of {len(db):,} chunks")
    together = (lists_of(files.factory) or 0) >= SHARED_LISTS
    trained = _train_together(sample, worker) if together else _train_alone(sample, worker)
    if trained is not None:
        index, learnt_from = trained
        is_auto = project.config.index == "auto"
        warning = too_coarse(index, learnt_from, len(db), project.config.recall, is_auto=is_auto)
        if warning is not None:  # known before all chunks are embedded
            log.warning(warning)
        index.save(files.trained, files.manifest(index, count, files.training))
    worker.barrier()
    _clear(worker, project, files, blocks)


@dataclass(frozen=True)
class _Sample:
    """What an index is trained on."""

    project: Project
    files: IndexFiles
    vectors: ChunkVectors
    blocks: BlockFolder
    """Of the vectors, unless all are stored."""
    count: int

    def rows(self, places: np.ndarray) -> np.ndarray:
        """Vectors by their places, which ascend: float32 [n, D]."""
        if self.vectors.stored:
            return self.vectors.of(map_dataset(_sample_file(self.project), "ids", _REMEDY)[places])
        out = np.empty((len(places), self.vectors.embedder.dim), dtype=np.float32)
        numbers = places // self.blocks.block_size
        for number in np.unique(numbers).tolist():
            block, own = self.blocks.blocks[number], numbers == number
            # Compared with its checksum when it was written, or found.
            out[own] = map_dataset(block.path, "data", _REMEDY, compare=False)[places[own] - block.start]
        return out

    def some(self, most: int) -> np.ndarray:
        """As many vectors at most, from all places evenly, as they are in the order of the documents."""
        count = min(most, self.count)
        return self.rows(np.arange(count) * self.count // count)


Trained = tuple[VectorIndex, np.ndarray]
"""An index, and vectors that its codes were learned from."""


def _train_alone(sample: _Sample, worker: Worker) -> Trained | None:
    """By faiss, in the first process."""
    if not worker.is_first:
        return None
    vectors = sample.rows(np.arange(sample.count))
    factory, metric = sample.files.factory, sample.project.config.metric
    return VectorIndex.train(factory, metric, vectors, num_threads=_threads_of_one(worker)), vectors


def _train_together(sample: _Sample, worker: Worker) -> Trained | None:
    """An index of many lists: their centres by all processes, the rest by the first one, on a part of the sample. A
    killed run goes on from the last iteration."""
    files, config = sample.files, sample.project.config
    factory, metric, num_lists = files.factory, config.metric, lists_of(files.factory)
    assert num_lists is not None
    signature = {"training": files.training}
    turning = BlockFolder(_state_folder(files) / "transforms", 1, 1, {"task": "transforms", **signature}, _REMEDY)

    def turn(block: Block) -> Arrays:
        return {"index": VectorIndex.with_transforms(factory, metric, sample.some(_MOST_FOR_CODES)).to_bytes()}

    compute_blocks(turning, turn, worker, "what turns vectors", "part")
    index = VectorIndex.of_bytes(turning.read(turning.blocks[0])["index"], factory, metric)
    index.check_training(sample.count)
    count = min(sample.count, POINTS_PER_LIST * num_lists)
    own = index.transformed(sample.rows(np.arange(*share_of(count, worker)) * sample.count // count))
    state = BlockFolder(_state_folder(files) / "lists", ITERATIONS, 1, {"task": "lists", **signature}, _REMEDY)
    nearest = functools.partial(nearest_centres, metric=metric)
    means = KMeans(num_lists, count, metric == "inner_product", config.seed, nearest)
    centres = means.run(own, worker, state)
    if not worker.is_first:
        return None
    learnt_from = sample.some(_MOST_FOR_CODES)
    index.finish_training(learnt_from, centres, num_threads=_threads_of_one(worker))
    return index, learnt_from


def _threads_of_one(worker: Worker) -> int | None:
    """Of the first process while the others wait: torchrun gave each of them one thread. None: as many as it has."""
    return len(os.sched_getaffinity(0)) if worker.world_size > 1 else None


def _state_folder(files: IndexFiles) -> Path:
    return files.root / "training"


def _clear(worker: Worker, project: Project, files: IndexFiles, blocks: BlockFolder) -> None:
    if worker.is_first:
        shutil.rmtree(_state_folder(files), ignore_errors=True)
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
