"""The tasks of a database build, in order, each of which goes on where it was stopped."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_grit.config.database.schema import RetroDbConfig, load_project_config, save_project_config
from megatron_grit.config.schema import ParallelConfig
from megatron_grit.data.chunks.chunk_db import ChunkDb
from megatron_grit.data.chunks.project import Project
from megatron_grit.errors import ConfigError, DataError
from megatron_grit.inference.encoders.load import MESH, load_embedder
from megatron_grit.inference.encoders.protocol import Embedder, EmbedderOptions
from megatron_grit.retrieval.stages.chunk import build_chunks
from megatron_grit.retrieval.stages.index import IndexFiles, add_to_index, train_index
from megatron_grit.retrieval.stages.preparation import MAKING, Preparation
from megatron_grit.retrieval.stages.query import query_neighbors
from megatron_grit.retrieval.stages.validate import validate_stage
from megatron_grit.retrieval.stages.vectors import embed_chunks, open_vectors
from megatron_grit.retrieval.stages.versions import add_documents, record_version, remove_documents
from megatron_grit.retrieval.stages.work import MINUTES, Worker, alone_in, worker
from megatron_grit.store.blocks import signature_of
from megatron_grit.store.logs import get_logger

log = get_logger(__name__)


def run_tasks(
    project_dir: Path,
    tasks: str,
    given: Mapping[str, Any],
    *,
    overwrite: str = "",
    validate: float | None = None,
    tombstone: str = "",
) -> None:
    """Build a database, or the part of it that tasks name. Under torchrun all processes call it. Whatever can be known
    to be wrong is refused before anything is removed, computed or kept.

    Args:
        project_dir: the database's directory; its config.json is made, or read and completed.
        tasks: comma list of tasks.
        given: settings of :class:`RetroDbConfig` that are not those of the directory, or of the defaults.
        overwrite: comma list of tasks that are done again from nothing, and what follows from them.
        validate: compute this share of the blocks of each task again and compare, instead of building.
        tombstone: documents that the task tombstone removes, as :func:`remove_documents` takes them.

    Raises:
        ConfigError: a wrong setting, or one that differs from what was built.
        DataError: a missing or damaged input; with ``validate``, a block that differs.
    """
    prepared = Preparation(project_dir, tasks, given, overwrite=overwrite, validate=validate, tombstone=tombstone)
    with worker() as this, alone_in(project_dir, this):
        embedder = project_embedder(prepared.wanted) if prepared.needs_embedder else None
        if this.is_first:
            if load_project_config(project_dir) != prepared.old:
                raise DataError("was changed by another command just now; start again", path=project_dir)
            prepared.check(embedder)
            if validate is None:
                prepared.remove()
                save_project_config(prepared.kept, project_dir)
        this.barrier()
        for stage in prepared.stages:
            if this.is_first:
                log.info(f"task {stage}")
            _run_stage(stage, prepared, this, embedder, tombstone)


def dry_run(project_dir: Path, tasks: str, given: Mapping[str, Any], **options: Any) -> list[str]:
    """Check all that :func:`run_tasks` checks first, in one process, and change nothing.

    Args:
        project_dir: as there, and so are the others.
        tasks: likewise.
        given: likewise.
        options: likewise. The number of processes that will run is that of the environment (WORLD_SIZE).

    Returns:
        What is there and what would be done, a line each.

    Raises:
        ConfigError: as there.
        DataError: as there.
    """
    prepared = Preparation(project_dir, tasks, given, **options)
    embedder, config = None, prepared.wanted
    lines = prepared.outline()
    with _one_process() as num_processes:
        if prepared.needs_embedder:
            prepared.check_mesh(num_processes)
            if any(getattr(config, f"embedder_{name}") > 1 for name in MESH):
                lines.append(f"embedder: {config.embedder}, not loaded here, for it is spread over processes")
            else:
                embedder = project_embedder(config, alone=True)
        return lines + prepared.check(embedder) + prepared.losses()


@contextmanager
def _one_process() -> Iterator[int]:
    """Be the only process, whatever a launcher's environment says; how many it says there will be."""
    before = os.environ.pop("WORLD_SIZE", None)
    try:
        yield int(before or "1")
    finally:
        if before is not None:
            os.environ["WORLD_SIZE"] = before


def _run_stage(stage: str, prepared: Preparation, worker: Worker, embedder: Embedder | None, tombstone: str) -> None:
    # What comes after the task add sees its documents.
    project = Project(prepared.folder, prepared.kept if stage in MAKING else prepared.wanted)
    if prepared.validate is not None:
        group = worker.in_group_of(embedder) if stage in _WITH_EMBEDDER else worker
        validate_stage(stage, project, group, embedder, prepared.validate)
    elif stage in MAKING and prepared.is_grown:
        log.info(f"task {stage}: left as it is; the task add adds documents")
    elif stage == "db-build":
        build_chunks(project, worker)
    elif stage == "tombstone":
        remove_documents(project, worker, tombstone)
    else:
        assert embedder is not None
        if stage == "embed" and "index-train" in prepared.stages:
            # Known before days of embedding.
            IndexFiles(project, ChunkDb(project), embedder.fingerprint, embedder.dim)
        _WITH_EMBEDDER[stage](project, worker.in_group_of(embedder), embedder)
    if stage == "add" and prepared.validate is None and worker.is_first:
        save_project_config(prepared.kept_after_adding(), prepared.folder)


def _embed(project: Project, worker: Worker, embedder: Embedder) -> None:
    vectors = open_vectors(project, worker, embedder)
    if worker.is_first:
        signatures = [signature_of(block.path) for block in vectors.blocks.blocks]
        count = sum(signature not in (None, vectors.blocks.signature) for signature in signatures)
        if count:
            raise DataError(
                f"{count} of {len(signatures)} blocks are of another embedder or of other chunks; put back what was "
                "changed, or make them again with --overwrite embed",
                path=vectors.blocks.folder,
            )
    worker.barrier()
    embed_chunks(vectors, worker)


def _add_to_index(project: Project, worker: Worker, embedder: Embedder) -> None:
    add_to_index(project, worker, embedder)
    record_version(project, worker, embedder)


_WITH_EMBEDDER: dict[str, Callable[[Project, Worker, Embedder], None]] = {
    "embed": _embed,
    "index-train": train_index,
    "index-add": _add_to_index,
    "add": add_documents,
    "query-neighbors": query_neighbors,
}


def project_embedder(config: RetroDbConfig, *, alone: bool = False) -> Embedder:
    """The embedder that a configuration names.

    Args:
        config: of the database.
        alone: whole in this process, for a few texts, whatever mesh the database is built with.

    Raises:
        ConfigError: it names none, or none that can be loaded by so many processes.
    """
    if config.embedder is None:
        raise ConfigError("embedder is not set; give the directory of an encoder or of one of our checkpoints")
    if not Path(config.embedder).exists():
        where = Path(config.embedder).absolute()
        raise ConfigError(
            f"embedder {config.embedder}: is not there ({where}); give a local directory, by its full path"
        )
    mesh: dict[str, Any] = {name: 1 if alone else getattr(config, f"embedder_{name}") for name in MESH}
    return load_embedder(
        config.embedder,
        EmbedderOptions(
            pooling=config.embedder_pooling,
            max_length=config.embedder_max_length,
            batch_tokens=config.batch_tokens,
            precision=config.embedder_precision,
            query_instruction=config.query_instruction,
        ),
        # A process may wait for the others of its group as long as processes do anywhere in a build.
        parallel=ParallelConfig(**mesh, timeout_minutes=MINUTES),
    )
