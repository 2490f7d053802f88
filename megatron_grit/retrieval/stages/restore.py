"""What is damaged made again, where documents were added since: tables of chunks of their blocks, as the task db-build
then does, and index files of their vectors, as index-add does."""

from __future__ import annotations

import itertools
from pathlib import Path

from megatron_grit.data.chunks.chunk_db import map_dataset
from megatron_grit.data.chunks.project import Project
from megatron_grit.data.chunks.versions import (
    StoredFile,
    Version,
    built_version,
    check_stored,
    infos_of,
    read_version,
    version_numbers,
)
from megatron_grit.errors import DataError
from megatron_grit.inference.encoders.protocol import Embedder
from megatron_grit.retrieval.database.cuts import clear_duplicates, cut_chunks, cuts_of, find_duplicates
from megatron_grit.retrieval.stages.add import Addition
from megatron_grit.retrieval.stages.compact import files_to_join, write_joined
from megatron_grit.retrieval.stages.db_build import write_tables
from megatron_grit.retrieval.stages.index_add import add_to_index
from megatron_grit.retrieval.stages.index_train import clear_blocks, restore_trained
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


def restore_index(project: Project, worker: Worker, embedder: Embedder) -> None:
    """Make those index files of the newest version again that are missing or damaged, the trained one first. All
    processes call it.

    Raises:
        DataError: what is made is not what the version was made of.
    """
    folder = project.folder
    versions = [read_version(folder, number) for number in version_numbers(folder)]
    trained = versions[-1].trained
    if not worker.from_first(lambda: _is_whole(folder, trained)):
        _announce(worker, trained)
        restore_trained(project, worker, embedder)
        _compare(project, worker, trained)
    damaged = worker.from_first(lambda: _damaged(folder, versions))
    for number, (version, paths) in enumerate(zip(versions, damaged, strict=True)):
        files = [file for file in _files_of(version) if file.path in paths]
        if not files:
            continue
        _announce(worker, files[0])
        if len(version.segments) == 1:
            add_to_index(project, worker, embedder)
        elif len(version.segments) > len(versions[number - 1].segments):
            _restore_addition(Addition(project, versions[number - 1], embedder, version.sources), worker)
        elif worker.is_first:
            write_joined(folder, versions[number - 1])
        for file in files:
            _compare(project, worker, file)


def _damaged(folder: Path, versions: list[Version]) -> list[list[str]]:
    """Of each version the paths of the index files that came with it and are no longer whole, as far as the newest
    needs them."""
    needed = {file.path for file in _files_of(versions[-1])}
    found: list[list[str]] = [[] for _ in versions]
    for number in reversed(range(len(versions))):
        version, before = versions[number], versions[number - 1] if number else None
        earlier = [file.path for file in _files_of(before)] if before else []
        own = [file for file in _files_of(version) if file.path not in earlier and file.path in needed]
        found[number] = [file.path for file in own if not _is_whole(folder, file)]
        if before and found[number] and 1 < len(version.segments) == len(before.segments):
            needed |= {file.path for file in files_to_join(before)}
    return found


def _files_of(version: Version) -> list[StoredFile]:
    return [file for segment in version.segments for file in segment.index]


def _restore_addition(addition: Addition, worker: Worker) -> None:
    codes = addition.encode(worker)
    if worker.is_first:
        addition.fill_index(codes)
    worker.barrier()
    clear_blocks(worker, addition.project, codes)


def _restore_first(project: Project, worker: Worker) -> None:
    version = built_version(project.folder)
    assert version is not None, "documents were added"
    cuts, root = cuts_of(project, infos_of(version.sources)), project.folder / "db"
    cut_chunks(project, cuts, worker)
    search = find_duplicates(project, cuts, root, worker)
    if worker.is_first:
        write_tables(project, cuts, search.state())
        clear_duplicates(root)
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
        log.warning(f"{table.path}: is missing or damaged, so it is made again")


def _compare(project: Project, worker: Worker, table: StoredFile) -> None:
    if worker.is_first:
        check_stored(project.folder, table)
    worker.barrier()
