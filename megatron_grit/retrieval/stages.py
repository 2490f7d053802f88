"""The tasks of a database build, in order, each of which goes on where it was stopped."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megatron_grit.config.retro_db import (
    RetroDbConfig,
    config_problems,
    load_project_config,
    save_project_config,
)
from megatron_grit.config.retro_stages import (
    FILES,
    STAGES,
    built_stages,
    changed_settings,
    expand_tasks,
    with_following,
)
from megatron_grit.config.schema import ParallelConfig
from megatron_grit.data.chunk_db import ChunkDb
from megatron_grit.data.retro_project import Project
from megatron_grit.errors import ConfigError
from megatron_grit.parallel.logs import get_logger
from megatron_grit.retrieval.chunk import build_chunks
from megatron_grit.retrieval.embed import MESH, Embedder, in_teams, load_embedder
from megatron_grit.retrieval.faiss_index import gpus_of_process
from megatron_grit.retrieval.index import IndexFiles, add_to_index, train_index
from megatron_grit.retrieval.query import query_neighbors
from megatron_grit.retrieval.validate import validate_stage
from megatron_grit.retrieval.vectors import embed_chunks, open_vectors
from megatron_grit.retrieval.versions import add_documents, is_grown, record_version, remove_documents
from megatron_grit.retrieval.work import MINUTES, Worker, alone_in, worker

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
    """Build a database, or the part of it that tasks name. Under torchrun all processes call it.

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
    stages = expand_tasks(tasks)
    overwritten = expand_tasks(overwrite) if overwrite else []
    for stage in overwritten:
        if stage not in stages:
            raise ConfigError(f"overwrite names {stage}, which is not among the tasks {', '.join(stages)}")
    if validate is not None and (overwritten or not 0 < validate <= 1):
        raise ConfigError(
            "validate compares and overwrites nothing"
            if overwritten
            else f"validate must be above 0 and at most 1, not {validate}"
        )
    if ("tombstone" in stages) != bool(tombstone):
        raise ConfigError("the task tombstone goes with --tombstone DATASET:DOCUMENT[,...] or a file of them")
    old = load_project_config(project_dir)
    config = dataclasses.replace(old or RetroDbConfig(), **given)
    problem = next(config_problems(config), None)
    if problem is not None:
        raise ConfigError(problem)
    if config.index_on_gpu and "query-neighbors" in stages:
        gpus_of_process()  # refused here where there are none
    with worker() as this, alone_in(project_dir, this):
        # Before anything is removed or computed: what is wrong with the embedder is known at once.
        needs_embedder = any(stage not in ("db-build", "tombstone") for stage in stages)
        embedder = project_embedder(config) if needs_embedder else None
        if this.is_first and validate is None:
            _prepare(project_dir, old, config, overwritten, embedder, growing="add" in stages)
        this.barrier()
        project = Project(project_dir, config)
        for stage in stages:
            if validate is not None:
                team = in_teams(this, embedder) if stage in _WITH_EMBEDDER else this
                validate_stage(stage, project, team, embedder, validate)
                continue
            if stage in ("db-build", "embed", "index-train", "index-add") and is_grown(project):
                log.info(f"task {stage}: done, and documents were added since; the task add adds more")
                continue
            if this.is_first:
                log.info(f"task {stage}")
            if stage == "db-build":
                build_chunks(project, this)
            elif stage == "tombstone":
                remove_documents(project, this, tombstone)
            else:
                assert embedder is not None
                _WITH_EMBEDDER[stage](project, in_teams(this, embedder), embedder)


def _embed(project: Project, worker: Worker, embedder: Embedder) -> None:
    embed_chunks(open_vectors(project, worker, embedder), worker)


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


def _prepare(
    project_dir: Path,
    old: RetroDbConfig | None,
    config: RetroDbConfig,
    overwritten: list[str],
    embedder: Embedder | None,
    *,
    growing: bool,
) -> None:
    """Check what changed, remove what is made again, and keep the settings. In one process."""
    if old is not None:
        if growing and config.data_paths[: len(old.data_paths)] == old.data_paths:
            old = dataclasses.replace(old, data_paths=config.data_paths)
        if overwritten and "db-build" not in overwritten and set(overwritten) & set(STAGES[:-1]):
            _refuse_grown(Project(project_dir, config))
        problem = next(changed_settings(old, config, built_stages(project_dir), overwritten), None)
        if problem is not None:
            raise ConfigError(f"{project_dir}: {problem}")
    if embedder and {"index-train", "index-add"} & set(overwritten) and "db-build" not in overwritten:
        project = Project(project_dir, config)
        IndexFiles(project, ChunkDb(project), embedder.fingerprint, embedder.dim)  # the index can be made
    for path in project_dir.rglob(".*.tmp"):  # of a run that was killed
        path.unlink(missing_ok=True)
    # What follows goes first: a kill here leaves nothing that belongs to what is gone.
    for stage in [stage for stage in reversed(FILES) if stage in with_following(overwritten)]:
        for pattern in FILES[stage]:
            for path in sorted(project_dir.glob(pattern)):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    save_project_config(config, project_dir)


def _refuse_grown(project: Project) -> None:
    if is_grown(project):
        raise ConfigError(
            f"{project.folder}: documents were added since the index was trained; to train it on all of them build the "
            "whole database again with --tasks build --overwrite db-build, or in another project directory"
        )


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
    mesh: dict[str, Any] = {name: 1 if alone else getattr(config, f"embedder_{name}") for name in MESH}
    return load_embedder(
        config.embedder,
        pooling=config.embedder_pooling,
        max_length=config.embedder_max_length,
        batch_tokens=config.batch_tokens,
        precision=config.embedder_precision,
        query_instruction=config.query_instruction,
        # A process may wait for the others of its team as long as processes do anywhere in a build.
        parallel=ParallelConfig(**mesh, timeout_minutes=MINUTES),
    )
