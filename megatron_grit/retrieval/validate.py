"""A random part of what was built, computed again and compared bit for bit."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

from tqdm import tqdm

from megatron_grit.data.block_files import Arrays, Block, BlockFolder, shares
from megatron_grit.data.chunk_db import ChunkDb
from megatron_grit.data.db_versions import VersionedDb
from megatron_grit.data.retro_project import Project
from megatron_grit.parallel.logs import get_logger
from megatron_grit.retrieval.chunk import recompute_chunks
from megatron_grit.retrieval.embed import Embedder
from megatron_grit.retrieval.faiss_index import VectorIndex
from megatron_grit.retrieval.index import IndexFiles, recompute_codes, recompute_sample
from megatron_grit.retrieval.query import Searcher, index_to_search
from megatron_grit.retrieval.vectors import open_vectors
from megatron_grit.retrieval.versions import stored_vectors, version_to_use
from megatron_grit.retrieval.work import Worker

log = get_logger(__name__)


class Check(NamedTuple):
    """What is compared."""

    what: str
    folder: BlockFolder
    compute: Callable[[Block], Arrays]
    """Makes a block again."""
    during: AbstractContextManager[None] = nullcontext()
    """As of :func:`compute_blocks`."""


def validate_stage(stage: str, project: Project, worker: Worker, embedder: Embedder | None, fraction: float) -> int:
    """Compare a random part of the blocks of a stage with what is computed now. All processes call it.

    Blocks that are not kept are passed over: those of the training sample and the codes without ``keep_embeddings``.

    Args:
        stage: one of STAGES.
        project: the database.
        worker: this process.
        embedder: that of the database; None for db-build.
        fraction: share of the blocks.

    Returns:
        Blocks that were compared, by all processes.

    Raises:
        DataError: a block is missing, damaged or differs.
    """
    total = 0
    for what, folder, compute, during in _checks(stage, project, worker, embedder):
        if not folder.folder.is_dir():
            log.info(f"{what}: not kept, nothing to compare")
            continue
        chosen = folder.sample(fraction, project.config.seed)
        mine = list(shares(chosen, worker.team, worker.num_teams))
        with during:
            for block in tqdm(mine, desc=f"{what}, again", unit="block", disable=None if worker.is_first else True):
                again = compute(block)
                if worker.leads:
                    folder.check(block, again)
        worker.barrier()
        log.info(f"{what}: {len(chosen)} of {len(folder.blocks)} blocks are equal, bit for bit")
        total += len(chosen)
    return total


def _checks(stage: str, project: Project, worker: Worker, embedder: Embedder | None) -> Iterator[Check]:
    if stage == "db-build":
        yield from itertools.starmap(Check, recompute_chunks(project))
        return
    assert embedder is not None
    if stage == "query-neighbors":
        yield from _neighbors(project, worker, embedder)
        return
    vectors = open_vectors(project, worker, embedder)
    files = IndexFiles(project, ChunkDb(project), embedder.fingerprint, embedder.dim)
    if stage == "embed":
        yield Check("embeddings", vectors.blocks, vectors.compute)
    elif stage == "index-train":
        yield Check("embeddings to train on", *recompute_sample(project, files, vectors))
    else:
        trained = VectorIndex.load(files.trained, embedder=files.embedder, chunks=files.chunks)
        yield Check("codes", *recompute_codes(project, files, vectors, trained))


def _neighbors(project: Project, worker: Worker, embedder: Embedder) -> Iterator[Check]:
    version = version_to_use(project, worker, embedder)
    db, index = VersionedDb(project, version), index_to_search(project, version, worker)
    vectors = stored_vectors(db, worker, embedder)
    for prefix in project.config.query_paths or project.config.data_paths[: len(version.sources)]:
        searcher = Searcher(project, db, prefix)
        searcher.prepare(worker)
        searcher.index, searcher.embedder, searcher.vectors = index, embedder, vectors
        during = nullcontext() if index is None else index.serving()
        yield Check(f"neighbors for {prefix}", searcher.blocks, searcher.compute, during)
