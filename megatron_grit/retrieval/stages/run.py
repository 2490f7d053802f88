"""Tasks run one after the other; each resumes from what a killed run finished."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from megatron_grit.config.database.schema import load_project_config, save_project_config
from megatron_grit.data.chunks.chunk_db import ChunkDb
from megatron_grit.data.chunks.project import Project
from megatron_grit.errors import DataError
from megatron_grit.inference.encoders.load import MESH
from megatron_grit.inference.encoders.protocol import Embedder
from megatron_grit.retrieval.database.index_files import IndexFiles
from megatron_grit.retrieval.estimate.lines import estimate_build, is_worth_it, lines_of
from megatron_grit.retrieval.stages.embed import project_embedder
from megatron_grit.retrieval.stages.preparation import Preparation
from megatron_grit.retrieval.stages.restore import restore_index, restore_tables
from megatron_grit.retrieval.stages.task import WARNING, Job, Task
from megatron_grit.retrieval.stages.tasks import TASKS
from megatron_grit.retrieval.work import Worker, alone_in, worker
from megatron_grit.store.blocks import shares
from megatron_grit.store.environment import planned_size
from megatron_grit.store.logs import get_logger
from megatron_grit.store.progress import Progress

log = get_logger(__name__)


def run_tasks(prepared: Preparation) -> None:
    """Build a database, or the part of it that tasks name. Under torchrun all processes call it. Whatever can be known
    to be wrong is refused before anything is removed, computed or kept.

    Raises:
        ConfigError: a wrong setting, or one that differs from what was built.
        DataError: a missing or damaged input; with ``validate``, a block that differs.
    """
    with worker() as this, alone_in(prepared.folder, this):
        if this.is_first and prepared.needs_embedder:  # what is known before one is loaded, which may take minutes
            prepared.check(None)
        embedder = project_embedder(prepared.wanted) if prepared.needs_embedder else None
        if this.is_first:
            if load_project_config(prepared.folder) != prepared.old:
                raise DataError("was changed by another command just now; start again", path=prepared.folder)
            for line in prepared.check(embedder):
                if line.startswith(WARNING):
                    log.warning(line.removeprefix(WARNING))
            if prepared.validate is None:
                prepared.remove()
                save_project_config(prepared.kept, prepared.folder)
        this.barrier()
        for name in prepared.tasks:
            if this.is_first:
                log.info(f"task {name}")
            _run_task(TASKS[name], prepared, this, embedder)


def dry_run(prepared: Preparation) -> list[str]:
    """Check all that :func:`run_tasks` checks first, in one process, and change nothing. The number of processes that
    will run is taken from the environment (WORLD_SIZE).

    Returns:
        What is there and what would be done, a line each.

    Raises:
        ConfigError: as for :func:`run_tasks`.
        DataError: as for :func:`run_tasks`.
    """
    embedder, config = None, prepared.wanted
    lines = prepared.outline()
    with _one_process() as num_processes:
        if prepared.needs_embedder:
            prepared.check_mesh(num_processes)
            if any(getattr(config, f"embedder_{name}") > 1 for name in MESH):
                lines.append(f"embedder: {config.embedder}, not loaded here, because it is sharded over processes")
            else:
                embedder = project_embedder(config, alone=True)
        lines += prepared.check(embedder)
        if embedder is not None and not prepared.is_grown and prepared.validate is None:
            lines += _estimate(Project(prepared.folder, config), prepared, embedder, num_processes)
        return lines + prepared.losses()


def _estimate(project: Project, prepared: Preparation, embedder: Embedder, num_processes: int) -> list[str]:
    """What the tasks will take, where they take long."""
    tasks = [name for name in prepared.tasks if name not in prepared.begun() or name in prepared.overwritten]
    if not tasks or not is_worth_it(project):
        return []
    return list(lines_of(estimate_build(project, embedder, tasks, num_processes), tasks))


@contextmanager
def _one_process() -> Iterator[int]:
    """Be the only process, whatever a launcher's environment says; how many it says there will be."""
    size = planned_size()
    before = {name: os.environ.pop(name) for name in ("RANK", "WORLD_SIZE") if name in os.environ}
    try:
        yield size
    finally:
        os.environ.update(before)


def _run_task(task: Task, prepared: Preparation, worker: Worker, embedder: Embedder | None) -> None:
    # What comes after the task add sees its documents.
    project = Project(prepared.folder, prepared.kept if task.makes_versions else prepared.wanted)
    group = worker.in_group_of(embedder) if task.needs_embedder else worker
    job = Job(project, group, embedder, prepared.tombstone)
    if prepared.validate is not None:
        validate_task(task, job, prepared.validate)
    elif prepared.leaves(task):
        if worker.is_first:
            log.info(f"task {task.name}: left as it is; the task add adds documents")
        if task.name == "db-build":
            restore_tables(project, worker)
        elif task.name in ("index-train", "index-add"):
            restore_index(project, group, job.embedder)
    else:
        if task.name == "embed" and "index-train" in prepared.tasks:
            # Known before days of embedding.
            IndexFiles(project, ChunkDb(project), job.embedder.fingerprint, job.embedder.dim)
        task.run(job)
        if task.name == "add" and worker.is_first:
            save_project_config(prepared.kept_after_adding(), prepared.folder)


def validate_task(task: Task, job: Job, fraction: float) -> int:
    """Compare a random part of the blocks of a task with what is computed now, and all of the tables made of them with
    their checksums. All processes call it.

    Blocks that are not kept are passed over: those of the training sample and the codes without ``keep_embeddings``.
    A database to which documents were added is compared as it was built; the task add compares what came later.

    Args:
        task: what is compared.
        job: as for the task.
        fraction: share of the blocks.

    Returns:
        Blocks that were compared, by all processes.

    Raises:
        DataError: a block or a table is missing, damaged or differs.
    """
    total, worker = 0, job.worker
    for what, folder, compute, during in task.validate(job):
        if not folder.folder.is_dir():
            if worker.is_first:
                log.info(f"{what}: not kept, nothing to compare")
            continue
        chosen = folder.sample(fraction, job.project.config.seed)
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
