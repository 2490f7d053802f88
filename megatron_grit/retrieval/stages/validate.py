"""A random part of what was built, computed again and compared bit for bit."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import numpy as np

from megatron_grit.data.chunks.chunk_db import DATASET, DOCUMENT, ChunkDb
from megatron_grit.data.chunks.project import DatasetInfo, Project
from megatron_grit.data.chunks.versions import (
    Version,
    VersionedDb,
    check_stored,
    read_version,
    removed_documents,
    version_numbers,
)
from megatron_grit.data.indexed.reader import IndexedFile
from megatron_grit.errors import DataError
from megatron_grit.inference.encoders.protocol import Embedder
from megatron_grit.retrieval.index.faiss_index import VectorIndex
from megatron_grit.retrieval.stages.chunk import recompute_chunks
from megatron_grit.retrieval.stages.index import IndexFiles, recompute_codes, recompute_sample
from megatron_grit.retrieval.stages.query import Searcher, index_to_search
from megatron_grit.retrieval.stages.vectors import find_chunks, open_vectors
from megatron_grit.retrieval.stages.versions import Addition, is_grown, stored_vectors, version_to_use
from megatron_grit.retrieval.stages.work import Worker
from megatron_grit.store.blocks import Arrays, Block, BlockFolder, shares
from megatron_grit.store.logs import get_logger
from megatron_grit.store.progress import Progress

log = get_logger(__name__)

_DAMAGED = "holds rows that are no chunks of the documents; delete it and run db-build again"


class Check(NamedTuple):
    """What is compared."""

    what: str
    folder: BlockFolder
    compute: Callable[[Block], Arrays]
    """Makes a block again."""
    during: AbstractContextManager[None] = nullcontext()
    """As of :func:`compute_blocks`."""


def validate_stage(stage: str, project: Project, worker: Worker, embedder: Embedder | None, fraction: float) -> int:
    """Compare a random part of the blocks of a stage with what is computed now, and all of the tables made of them with
    their checksums. All processes call it.

    Blocks that are not kept are passed over: those of the training sample and the codes without ``keep_embeddings``.
    A database to which documents were added is compared as it was built; the task add compares what came later.

    Args:
        stage: one of STAGES, or of CHANGES.
        project: the database.
        worker: this process.
        embedder: that of the database; None for db-build and tombstone.
        fraction: share of the blocks.

    Returns:
        Blocks that were compared, by all processes.

    Raises:
        DataError: a block or a table is missing, damaged or differs.
    """
    total = 0
    for what, folder, compute, during in _checks(stage, project, worker, embedder):
        if not folder.folder.is_dir():
            if worker.is_first:
                log.info(f"{what}: not kept, nothing to compare")
            continue
        chosen = folder.sample(fraction, project.config.seed)
        mine = list(shares(chosen, worker.group, worker.num_groups))
        # The others have about as many.
        bar = Progress(len(mine), f"{what}, again", "block", enabled=worker.is_first and bool(mine))
        with bar, during:
            for block in mine:
                again = compute(block)
                if worker.leads:
                    folder.check(block, again)
                bar.update(1)
        worker.barrier()
        if worker.is_first:
            log.info(f"{what}: {len(chosen)} of {len(folder.blocks)} blocks are equal, bit for bit")
        total += len(chosen)
    return total


def _checks(stage: str, project: Project, worker: Worker, embedder: Embedder | None) -> Iterator[Check]:
    if stage == "tombstone":
        _check_tombstones(project, worker)
    elif stage == "db-build":
        built = _as_built(project)
        yield from itertools.starmap(Check, recompute_chunks(built))
        if worker.is_first:
            check_merged(built)
        worker.barrier()
    else:
        assert embedder is not None
        if stage == "add":
            yield from _added(project, worker, embedder)
        elif stage == "query-neighbors":
            yield from _neighbors(project, worker, embedder)
        else:
            yield from _index(stage, _as_built(project), worker, embedder)


def _index(stage: str, project: Project, worker: Worker, embedder: Embedder) -> Iterator[Check]:
    vectors = open_vectors(project, worker, embedder)
    if stage == "embed":
        yield Check("embeddings", vectors.blocks, vectors.compute)
        return
    files = IndexFiles(project, ChunkDb(project), embedder.fingerprint, embedder.dim)
    if stage == "index-train":
        yield Check("embeddings to train on", *recompute_sample(project, files, vectors))
    else:
        trained = VectorIndex.load(files.trained, embedder=files.embedder, chunks=files.chunks)
        yield Check("codes", *recompute_codes(project, files, vectors, trained))


def _neighbors(project: Project, worker: Worker, embedder: Embedder) -> Iterator[Check]:
    version = version_to_use(project, worker, embedder)
    db, index = VersionedDb(project, version), index_to_search(project, version, worker)
    vectors = stored_vectors(db, worker, embedder)
    for prefix in project.config.query_paths or project.config.data_paths[: len(version.sources)]:
        searcher = Searcher(project, db, prefix, worker)
        if worker.is_first:
            searcher.check()
        worker.barrier()
        searcher.open()
        searcher.index, searcher.embedder, searcher.vectors = index, embedder, vectors
        during = nullcontext() if index is None else index.serving()
        yield Check(f"neighbors for {prefix}", searcher.blocks, searcher.compute, during)


def _added(project: Project, worker: Worker, embedder: Embedder) -> Iterator[Check]:
    """What each version added that added documents."""
    versions = [read_version(project.folder, number) for number in version_numbers(project.folder)]
    for before, version in itertools.pairwise(versions):
        if len(version.segments) <= len(before.segments):
            continue
        addition = Addition(project, before, embedder, version.sources)
        for what, folder, compute in addition.recompute_chunks():
            yield Check(f"{what}, version {version.number}", folder, compute)
        if worker.is_first:
            segment = version.segments[-1]
            for file in (segment.table, *segment.index):
                check_stored(project.folder, file, thorough=True)
        worker.barrier()
        yield Check(f"codes of version {version.number}", *addition.recompute_codes())


def _check_tombstones(project: Project, worker: Worker) -> None:
    if worker.is_first:
        for number in version_numbers(project.folder):
            removed_documents(project.folder, read_version(project.folder, number))
    worker.barrier()


def _as_built(project: Project) -> Project:
    """The database before documents were added to it."""
    if not is_grown(project):
        return project
    versions = [read_version(project.folder, number) for number in version_numbers(project.folder)]
    return _BuiltProject(project, next(version for version in reversed(versions) if len(version.segments) == 1))


class _BuiltProject(Project):
    """A database as it was before documents were added: its files are the first documents of those that are there.

    Args:
        project: the database.
        version: one of a single segment.

    Raises:
        DataError: the files no longer begin with these documents.
    """

    def __init__(self, project: Project, version: Version) -> None:
        VersionedDb(project, version)
        self._sources = version.sources
        paths = [source.prefix for source in version.sources]
        super().__init__(project.folder, dataclasses.replace(project.config, data_paths=paths))

    def file(self, number: int) -> IndexedFile:
        file = super().file(number)
        file.num_documents = self._sources[number].num_documents
        return file

    def fingerprint(self, number: int) -> str:
        return self._sources[number].fingerprint

    def _check_unchanged(self, info: DatasetInfo) -> None:
        """They were looked at when this was made."""


def check_merged(project: Project) -> None:
    """Compare the merged tables with the blocks of chunks that they were made of, and with the newest version. In one
    process.

    Raises:
        DataError: a row is no chunk of its documents, or a file was changed.
    """
    numbers = version_numbers(project.folder)
    if numbers:
        check_stored(project.folder, read_version(project.folder).segments[0].table, thorough=True)
    folders = [folder for _, folder, _ in recompute_chunks(project)]
    for part in ("train", "valid"):
        db, found = ChunkDb(project, part), 0
        for number, folder in enumerate(folders):
            for block in folder.blocks:
                rows = folder.read(block, "chunks_valid")["chunks_valid"]
                ids = find_chunks(db.rows, number, rows[:, 0], rows[:, 1]) if len(rows) else np.empty(0, np.int64)
                there = ids >= 0
                found_rows = db.rows[ids[there]]
                same = (found_rows[:, DATASET] == number).all() and (found_rows[:, DOCUMENT:] == rows[there]).all()
                if not same or not np.array_equal(ids[there], np.arange(found, found + there.sum())):
                    raise DataError(_DAMAGED, path=db.path)
                found += int(there.sum())
        if found != len(db):
            raise DataError(_DAMAGED, path=db.path)
