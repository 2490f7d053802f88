"""The tasks of a database build, in order, each of which goes on where it was stopped."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Callable, Iterator, Mapping
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
from megatron_grit.data.retro_project import Project
from megatron_grit.errors import ConfigError, DataError
from megatron_grit.parallel.logs import get_logger
from megatron_grit.retrieval.chunk import build_chunks
from megatron_grit.retrieval.embed import Embedder, load_embedder
from megatron_grit.retrieval.index import add_to_index, train_index
from megatron_grit.retrieval.query import query_neighbors
from megatron_grit.retrieval.validate import validate_stage
from megatron_grit.retrieval.vectors import embed_chunks, open_vectors
from megatron_grit.retrieval.versions import add_documents, is_grown, record_version, remove_documents
from megatron_grit.retrieval.work import Worker, worker

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
    with worker() as this, _alone_in(project_dir, this):
        if this.is_first and validate is None:
            _prepare(project_dir, old, config, overwritten, growing="add" in stages)
        this.barrier()
        project = Project(project_dir, config)
        embedder: Embedder | None = None
        for stage in stages:
            if stage not in ("db-build", "tombstone"):
                embedder = embedder or project_embedder(config)
            if validate is not None:
                validate_stage(stage, project, this, embedder, validate)
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
                _WITH_EMBEDDER[stage](project, this, embedder)


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
    project_dir: Path, old: RetroDbConfig | None, config: RetroDbConfig, overwritten: list[str], *, growing: bool
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


@contextlib.contextmanager
def _alone_in(project_dir: Path, worker: Worker) -> Iterator[None]:
    """Hold the lock of a project directory: two builds at a time would remove each other's files."""
    if not worker.is_first:
        yield
        return
    import fcntl

    try:
        project_dir.mkdir(parents=True, exist_ok=True)
        file = (project_dir / ".lock").open("w")
    except OSError as error:
        raise DataError(f"cannot be written ({error.strerror})", path=project_dir) from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError("another command works on it; wait for it or end it", path=project_dir) from None
        except OSError as error:  # a file system without locks
            log.warning(f"{project_dir}: cannot be locked ({error.strerror}); start no second command on it")
        yield


def project_embedder(config: RetroDbConfig) -> Embedder:
    """The embedder that a configuration names.

    Raises:
        ConfigError: it names none, or none that can be loaded.
    """
    if config.embedder is None:
        raise ConfigError("embedder is not set; give the directory of an encoder or of one of our checkpoints")
    return load_embedder(
        config.embedder,
        pooling=config.embedder_pooling,
        max_length=config.embedder_max_length,
        batch_tokens=config.batch_tokens,
        precision=config.embedder_precision,
        query_instruction=config.query_instruction,
    )
