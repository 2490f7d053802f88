"""The task index-add: the trained index filled with all chunks, and its recall measured against exact search; and the
task recall, which measures it for questions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np

from megatron_grit.data.chunks.chunk_db import ChunkDb
from megatron_grit.data.chunks.project import Project
from megatron_grit.data.chunks.versions import Version, built_chunks
from megatron_grit.errors import DataError
from megatron_grit.inference.encoders.protocol import Embedder
from megatron_grit.retrieval.database.index_files import IndexFiles, fill, is_finished, num_added
from megatron_grit.retrieval.database.question_recall import exact_beside, measure_questions
from megatron_grit.retrieval.database.vectors import ChunkVectors, open_vectors
from megatron_grit.retrieval.database.versions import record_version, searches_of
from megatron_grit.retrieval.index.faiss_index import VectorIndex, exact_search
from megatron_grit.retrieval.index.manifest import read_manifest
from megatron_grit.retrieval.index.recall import (
    QUESTIONS_FILE,
    RECALL_AT,
    SearchSettings,
    choose_search,
    read_search,
    report_recall,
    without_own,
)
from megatron_grit.retrieval.index.recall_queries import NUM_QUERIES, RecallQuestions
from megatron_grit.retrieval.index.search import ShardedIndex, merge_in_turn
from megatron_grit.retrieval.stages.index_train import check_index_of, clear_blocks
from megatron_grit.retrieval.stages.task import Inputs, Job, Report, Task
from megatron_grit.retrieval.work import Check, Worker, compute_blocks
from megatron_grit.store.blocks import Arrays, Block, BlockFolder, read_arrays, signature_of, write_arrays
from megatron_grit.store.digest import digest_of_settings
from megatron_grit.store.progress import Progress
from megatron_grit.store.sealed import write_sealed


class Recall(Task):
    """Chooses how the index is searched for questions, and measures what that finds, in a database that is built."""

    name = "recall"
    makes = ("index/recall_queries/questions", f"index/*/*/{QUESTIONS_FILE}")
    trace = f"index/*/*/{QUESTIONS_FILE}"

    def check(self, inputs: Inputs) -> Iterator[str]:
        questions = RecallQuestions(inputs.project, "")
        count = len(questions.texts())
        if not count:
            raise DataError("holds no question", path=questions.path)
        yield f"recall_queries: {count:,} questions of {questions.path}, {min(count, NUM_QUERIES):,} of them are asked"

    def run(self, job: Job) -> None:
        measure_questions(job.project, job.worker, job.embedder)

    def validate(self, job: Job) -> Iterator[Check]:
        if job.project.config.recall_queries is not None:
            questions = RecallQuestions(job.project, job.embedder.fingerprint)
            if questions.is_drawn:
                yield Check("questions", questions.blocks, lambda block: questions.embedded(job.embedder, block))


class IndexAdd(Task):
    """Adds all chunks to the index, measures its recall, and writes the first version of the database."""

    name = "index-add"
    makes_versions = True
    settings = ("add_load_fraction", "num_shards")
    makes = (
        "index/recall_queries",
        *(f"index/*/*/{name}" for name in ("added_*", "add_codes*", "exact_neighbors.hdf5", "search*.json")),
    )
    trace = "index/*/*/search.json"

    def check(self, inputs: Inputs) -> Iterator[str]:
        for prefix in inputs.project.config.query_paths:
            yield inputs.project.outline(prefix)
        yield from check_index_of(inputs)

    def run(self, job: Job) -> None:
        asks = job.project.config.recall_queries is not None
        add_to_index(job.project, job.worker, job.embedder, with_questions=asks)
        record_version(job.project, job.worker, job.embedder)
        if asks:
            measure_questions(job.project, job.worker, job.embedder)

    def validate(self, job: Job) -> Iterator[Check]:
        db = built_chunks(job.project)
        files = IndexFiles(job.project, db, job.embedder.fingerprint, job.embedder.dim)
        trained = VectorIndex.load(files.trained, embedder=files.embedder, chunks=files.chunks)
        yield code_blocks(job.project, files, open_vectors(job.project, job.worker, job.embedder, db), trained)

    def describe(self, db: ChunkDb, version: Version | None, *, verify: bool) -> Report:
        """As :class:`Task` says: the index of the version, and how it is searched."""
        if version is None:
            return {"index": None}
        folder = db.project.folder
        manifests = [read_manifest(folder / file.path) for segment in version.segments for file in segment.index]
        return {
            "index": {
                "factory": manifests[0].factory,
                "metric": manifests[0].metric,
                "dim": manifests[0].dim,
                "num_trained": manifests[0].num_trained,
                "num_vectors": sum(manifest.num_vectors for manifest in manifests),
                "num_files": len(manifests),
                "bytes": sum(manifest.bytes for manifest in manifests),
                "search": dataclasses.asdict(read_search(folder / version.search)),
                "searches": {name: dataclasses.asdict(found) for name, found in searches_of(folder, version).items()},
            }
        }


def add_to_index(project: Project, worker: Worker, embedder: Embedder, *, with_questions: bool = False) -> None:
    """The stage index-add: codes by all processes, joined in the order of the chunks; then the recall, if it is not
    known for these settings of the search. All processes call it.

    Args:
        project: the database.
        worker: this process.
        embedder: of its chunks.
        with_questions: vectors are compared with ``recall_queries`` as well, for
            :func:`~megatron_grit.retrieval.database.question_recall.measure_questions`, which follows.

    Raises:
        DataError: the trained index is missing, damaged or of another embedder.
    """
    db = built_chunks(project)
    files = IndexFiles(project, db, embedder.fingerprint, embedder.dim)
    trained = VectorIndex.load(files.trained, embedder=files.embedder, chunks=files.chunks)
    if read_manifest(files.trained).signature != files.training:
        raise DataError(
            "was trained with other settings; run --tasks index-build --overwrite index-train", path=files.trained
        )
    adding = files.adding()
    vectors = open_vectors(project, worker, embedder, db)
    is_added = worker.from_first(lambda: _is_added(files, adding))
    beside = None
    if not is_added:
        files.queries.prepare(vectors, worker)
        if with_questions:
            beside = exact_beside(project, vectors, worker)
    what, blocks, compute, _ = code_blocks(project, files, vectors, trained, beside)
    if not is_added:
        compute_blocks(blocks, compute, worker, what)
        if worker.is_first:
            exact = _exact_neighbors(blocks, files.queries.read()[0], project.config.metric)
            write_arrays(files.exact, {"exact": exact}, adding)
        _join(files, blocks, len(db), adding, worker)
    if worker.is_first:
        measure_search(files)
    clear_blocks(worker, project, blocks)


def code_blocks(
    project: Project,
    files: IndexFiles,
    vectors: ChunkVectors,
    trained: VectorIndex,
    beside: Callable[[Block, np.ndarray], None] | None = None,
) -> Check:
    """The blocks of codes, with what is nearest in each to the queries that measure the recall, and what makes one.

    Args:
        project: the database.
        files: of its index.
        vectors: of its chunks.
        trained: the index without vectors.
        beside: is given the vectors of each block as well, which may cost days to make.

    Raises:
        DataError: the trained index is missing.
    """
    metric, fraction = project.config.metric, project.config.add_load_fraction
    queries: list[np.ndarray] = []

    def compute(block: Block) -> Arrays:
        if not queries:
            queries.append(files.queries.read()[1])
        part = vectors.of_block(block, num_added(fraction, len(block)))
        if beside is not None:
            beside(block, part)
        scores, rows = exact_search(queries[0], part, RECALL_AT + 1, metric)
        return {"codes": trained.encode(part), "exact_scores": scores, "exact_ids": rows + block.start}

    # Those that were drawn: query_paths may be others by now.
    signature = {"task": "add_codes", "adding": files.adding(), "queries": files.queries.drawn.signature}
    folder = BlockFolder(
        files.folder / "add_codes", len(vectors.db), project.config.block_size, signature, "run --tasks index-add"
    )
    return Check("codes", folder, compute)


def _is_added(files: IndexFiles, adding: str) -> bool:
    return all(is_finished(path, adding) for path in files.added) and signature_of(files.exact) == adding


def _join(files: IndexFiles, blocks: BlockFolder, num_chunks: int, adding: str, worker: Worker) -> None:
    """Fill the index, or each of its shards with a run of chunks. Where each process will hold some of the shards, the
    processes fill them at the same time; else one process does, a shard at a time."""
    count = len(files.added)
    bounds = [shard * num_chunks // count for shard in range(count + 1)]
    fillers = worker.world_size if files.config.index_placement == "spread" else 1
    mine = [shard for shard in range(count) if shard * fillers // count == worker.rank]
    mine = [shard for shard in mine if not is_finished(files.added[shard], adding)]
    num_trained = read_manifest(files.trained).num_trained
    total = sum(bounds[shard + 1] - bounds[shard] for shard in mine)
    with Progress(total, "index", "chunk", enabled=worker.is_first) as bar:
        for shard in mine:
            index = fill(files.trained, blocks, bounds[shard], bounds[shard + 1], report=bar.update)
            index.save(files.added[shard], files.manifest(index, num_trained, adding))
    worker.barrier()


def _exact_neighbors(blocks: BlockFolder, query_ids: np.ndarray, metric: str) -> np.ndarray:
    """The exact nearest chunks of each query, itself left out: int64 [Q, RECALL_AT], -1 where there are fewer."""
    arrays = (blocks.read(block, "exact_scores", "exact_ids") for block in blocks.blocks)
    _, ids = merge_in_turn(((part["exact_scores"], part["exact_ids"]) for part in arrays), RECALL_AT + 1, metric)
    return without_own(ids, query_ids, RECALL_AT)


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
        settings,
        signature=signature,
        population=drawn.population,
        queries=drawn.source,
        query_instruction=drawn.query_instruction,
    )
    write_sealed(files.search, dataclasses.asdict(settings))
    report_recall(config, index, settings)
    return settings
