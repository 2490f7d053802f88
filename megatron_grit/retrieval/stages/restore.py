"""Tables of chunks made again of their blocks, where documents were added since: what the task db-build then does."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

from megatron_grit.data.chunks.chunk_db import map_dataset
from megatron_grit.data.chunks.project import Project
from megatron_grit.data.chunks.versions import (
    StoredFile,
    built_version,
    check_stored,
    infos_of,
    read_version,
    version_numbers,
)
from megatron_grit.errors import DataError
from megatron_grit.retrieval.database.cuts import cut_chunks, cuts_of, find_duplicates
from megatron_grit.retrieval.stages.add import Addition
from megatron_grit.retrieval.stages.db_build import write_tables
from megatron_grit.retrieval.work import Worker
from megatron_grit.store.logs import get_logger

log = get_logger(__name__)


def restore_tables(project: Project, worker: Worker) -> None:
    """Make those tables of the newest version again that are missing or damaged. All processes call it.

    Raises:
        DataError: what is made is not what the version was made of, because documents or blocks are others.
    """
    folder, numbers = project.folder, version_numbers(project.folder)
    segments = read_version(folder).segments
    if not worker.from_first(lambda: _is_whole(folder, segments[0].table) and _is_valid_whole(project)):
        _announce(worker, segments[0].table)
        _restore_first(project, worker)
        _compare(project, worker, segments[0].table)
    for before, after in itertools.pairwise(map(lambda number: read_version(folder, number), numbers)):
        if len(after.segments) == len(before.segments):
            continue
        table = after.segments[-1].table
        if not worker.from_first(lambda table=table: _is_whole(folder, table)):  # type: ignore[misc]
            _announce(worker, table)
            addition = Addition(project, before, None, after.sources)
            cut_chunks(project, addition.cuts, worker)
            addition.leave_out(worker)
            _compare(project, worker, table)


def _restore_first(project: Project, worker: Worker) -> None:
    version = built_version(project.folder)
    assert version is not None, "documents were added"
    cuts, between = cuts_of(project, infos_of(version.sources)), project.folder / "db" / "duplicates"
    cut_chunks(project, cuts, worker)
    search = find_duplicates(project, cuts, between, worker)
    if worker.is_first:
        write_tables(project, cuts, search.state())
        shutil.rmtree(between, ignore_errors=True)
    worker.barrier()


def _is_whole(folder: Path, table: StoredFile) -> bool:
    try:
        check_stored(folder, table)
    except DataError:
        return False
    return True


def _is_valid_whole(project: Project) -> bool:
    try:
        map_dataset(project.merged / "valid.hdf5", "chunks")
    except DataError:
        return False
    return True


def _announce(worker: Worker, table: StoredFile) -> None:
    if worker.is_first:
        log.warning(f"{table.path}: is missing or damaged, so it is made again of its blocks")


def _compare(project: Project, worker: Worker, table: StoredFile) -> None:
    if worker.is_first:
        check_stored(project.folder, table)
    worker.barrier()
