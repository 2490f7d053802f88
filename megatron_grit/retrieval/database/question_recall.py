"""What a search finds for questions: measured in any version of a database, without building again."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from megatron_grit.data.chunks.project import Project
from megatron_grit.data.chunks.versions import VersionedDb, is_among
from megatron_grit.errors import DataError
from megatron_grit.inference.encoders.protocol import Embedder
from megatron_grit.retrieval.database.index_files import num_added
from megatron_grit.retrieval.database.vectors import ChunkVectors
from megatron_grit.retrieval.database.versions import (
    nearest_chunks,
    open_index,
    questions_path,
    version_to_use,
    version_vectors,
)
from megatron_grit.retrieval.index.faiss_index import exact_search
from megatron_grit.retrieval.index.recall import RECALL_AT, choose_search, read_search, report_recall
from megatron_grit.retrieval.index.recall_queries import RecallQuestions
from megatron_grit.retrieval.index.search import Found, ShardedIndex, merge_in_turn
from megatron_grit.retrieval.work import Worker, compute_blocks
from megatron_grit.store.blocks import Arrays, Block, BlockFolder
from megatron_grit.store.digest import digest_of_settings
from megatron_grit.store.sealed import write_sealed


def _exact_folder(questions: RecallQuestions) -> Path:
    return questions.folder / "exact"


class _Exact:
    """What is nearest to questions in each block of the chunks of a segment, by comparing all.

    Args:
        project: the database.
        questions: drawn and embedded.
        vectors: of the chunks of a segment.
        number: of the segment.
        db: the version that they are of; None: it is being built.
    """

    def __init__(
        self,
        project: Project,
        questions: RecallQuestions,
        vectors: ChunkVectors,
        number: int = 0,
        db: VersionedDb | None = None,
    ) -> None:
        self._config, self._vectors = project.config, vectors
        self._db = None if db is None or not len(db.tombstones) else db
        self.first = 0 if db is None else sum(segment.num_chunks for segment in db.version.segments[:number])
        self._queries = questions.read()[1]
        signature = {
            "task": "recall",
            "vectors": vectors.blocks.signature,
            "queries": questions.drawn.signature,
            "metric": project.config.metric,
            "fraction": project.config.add_load_fraction,
            "removed": None if db is None or db.version.tombstones is None else db.version.tombstones.sha256,
        }
        folder = _exact_folder(questions) / f"{number:04d}"
        self.blocks = BlockFolder(folder, len(vectors.db), project.config.block_size, signature, "run --tasks recall")

    def of(self, block: Block, vectors: np.ndarray) -> Arrays:
        """Of a block whose vectors are known: those that are in the index, without removed ones."""
        there = np.arange(block.start, block.start + len(vectors)) + self.first
        if self._db is not None:
            there = there[~is_among(self._db.keys(there), self._db.tombstones)]
        rows = there - self.first - block.start
        scores, found = exact_search(self._queries, vectors[rows], RECALL_AT, self._config.metric)
        return {"scores": scores, "ids": there[found]}

    def compute(self, block: Block) -> Arrays:
        """Of a block."""
        return self.of(block, self._vectors.of_block(block, num_added(self._config.add_load_fraction, len(block))))


def exact_beside(project: Project, vectors: ChunkVectors, worker: Worker) -> Callable[[Block, np.ndarray], None]:
    """What compares questions with the vectors of a block while the index is made of them, so that nothing is embedded
    for it again. All processes call it.

    Args:
        project: the database.
        vectors: of the chunks that it is built of.
        worker: this process.

    Raises:
        DataError: there is no question.
    """
    questions = RecallQuestions(project, vectors.embedder.fingerprint)
    questions.prepare(vectors.embedder, worker)
    exact = _Exact(project, questions, vectors)

    def beside(block: Block, part: np.ndarray) -> None:
        if worker.leads:
            exact.blocks.write(exact.blocks.blocks[block.number], exact.of(block, part))

    return beside


def measure_questions(project: Project, worker: Worker, embedder: Embedder) -> None:
    """Choose how the version to use is searched for the texts of ``recall_queries``, and measure what that finds,
    unless it is known. Chunks whose vectors are not stored are embedded for it. All processes call it.

    Raises:
        ConfigError: ``recall_queries`` is null.
        DataError: there is no question, or no index, or it is of another embedder.
    """
    version = version_to_use(project, worker, embedder)
    path, config = questions_path(project.folder, version), project.config
    questions = RecallQuestions(project, embedder.fingerprint)
    questions.prepare(embedder, worker)
    tombstones = version.tombstones.sha256 if version.tombstones else None
    signature = digest_of_settings(
        {
            "queries": questions.drawn.signature,
            "index": [file.sha256 for segment in version.segments for file in segment.index],
            "tombstones": tombstones,
            "nprobe": config.nprobe,
            "ef_search": config.ef_search,
            "recall": config.recall,
        }
    )

    def is_known() -> bool:
        try:
            return read_search(path).signature == signature
        except DataError:  # missing or damaged
            return False

    if worker.from_first(is_known):
        return
    db, parts = VersionedDb(project, version), []
    for number, vectors in enumerate(version_vectors(db, worker, embedder).parts):
        exact = _Exact(project, questions, vectors, number, db)
        compute_blocks(exact.blocks, exact.compute, worker, "chunks compared with questions")
        parts.append(exact.blocks)
    if worker.is_first:
        index = open_index(project, version)
        assert isinstance(index, ShardedIndex), "opened by this process alone"
        ids, queries = questions.read()
        nearest = merge_in_turn(_found(parts), RECALL_AT, config.metric)[1]
        settings = replace(
            choose_search(index, config, queries, ids, nearest, lambda asked, k: nearest_chunks(db, index, asked, k)),
            population="questions",
            queries=questions.drawn.source,
            queries_sha256=questions.sha256,
            query_instruction=questions.drawn.query_instruction,
            version=version.number,
            signature=signature,
        )
        write_sealed(path, asdict(settings))
        report_recall(config, index, settings)
        shutil.rmtree(_exact_folder(questions), ignore_errors=True)
    worker.barrier()


def _found(parts: list[BlockFolder]) -> Iterator[Found]:
    """Scores and ids of each block."""
    for blocks in parts:
        for block in blocks.blocks:
            part = blocks.read(block)
            yield part["scores"], part["ids"]
