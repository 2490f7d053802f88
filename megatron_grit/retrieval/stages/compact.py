"""The task compact: the index files that additions made, joined into one.

A search visits every file, and finds the lists of each anew: after many additions that costs more than the chunks do.
Ids stay, so tables of neighbors stay as well; files of earlier versions are left to them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from megatron_grit.config.database.schema import version_numbers
from megatron_grit.data.chunks.project import Project
from megatron_grit.data.chunks.versions import AddedChunks, StoredFile, Version, check_stored, read_version, stored_file
from megatron_grit.errors import ConfigError
from megatron_grit.retrieval.database.versions import next_version
from megatron_grit.retrieval.index.faiss_index import VectorIndex
from megatron_grit.retrieval.index.manifest import read_manifest
from megatron_grit.retrieval.stages.task import Job, Task
from megatron_grit.retrieval.work import Check, Worker
from megatron_grit.store.logs import get_logger

log = get_logger(__name__)


class Compact(Task):
    """Joins the index files of all additions into one, in a new version. The first build's stay as they are."""

    name = "compact"
    needs_embedder = False

    def run(self, job: Job) -> None:
        join_additions(job.project, job.worker)

    def validate(self, job: Job) -> Iterator[Check]:
        """As :class:`Task` says: files that were joined are compared with their checksums."""
        folder = job.project.folder
        if job.worker.is_first:
            for number in version_numbers(folder):
                for segment in read_version(folder, number).segments:
                    for file in segment.index if segment.num_covered > 1 else ():
                        check_stored(folder, file, thorough=True)
        job.worker.barrier()
        yield from ()


def join_additions(project: Project, worker: Worker) -> None:
    """The task compact. All processes call it; one works, which holds the joined index in memory.

    Raises:
        ConfigError: a pinned version; files of the newest are joined.
        DataError: no database was built, or a file is missing or damaged.
    """
    if project.config.version is not None:
        raise ConfigError(f"version is {project.config.version}; compact works on the newest: set it to null")
    if worker.is_first:
        _join(project)
    worker.barrier()


def _join(project: Project) -> None:
    folder, before = project.folder, read_version(project.folder)
    first, added = before.segments[0], before.segments[1:]
    files = files_to_join(before)
    if len(files) < 2:
        log.info(f"version {before.number} has {len(files)} index files of additions: there is nothing to join")
        return
    joined = write_joined(folder, before)
    segments: list[AddedChunks] = [replace(segment, index=[], num_covered=0) for segment in added]
    segments[0] = replace(added[0], index=[joined], num_covered=len(added))
    note = f"joined {len(files)} index files"
    version = next_version(folder, before, note, segments=[first, *segments])
    log.info(f"version {version.number} of the database: {note}")


def files_to_join(before: Version) -> list[StoredFile]:
    """Those of all additions of a version."""
    return [file for segment in before.segments[1:] for file in segment.index]


def write_joined(folder: Path, before: Version) -> StoredFile:
    """Write the index file that is joined of those of a version. In one process.

    Raises:
        DataError: one of them is missing or damaged.
    """
    trained = folder / before.trained.path
    index = VectorIndex.load(trained, embedder=before.embedder)
    for file in files_to_join(before):
        index.append(VectorIndex.load(check_stored(folder, file), embedder=before.embedder))
    path = trained.parent / f"compact_v{before.number + 1:04d}.faissindex"
    manifest = replace(read_manifest(trained), chunks=before.chunks, num_vectors=len(index))
    index.save(path, manifest)
    return stored_file(folder, path, manifest.sha256)
