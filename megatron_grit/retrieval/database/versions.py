"""The versions of a database: recorded when an index was built, chosen and opened to search."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np

from megatron_grit.data.chunks.chunk_db import ChunkDb, map_dataset
from megatron_grit.data.chunks.document_ranges import document_ranges
from megatron_grit.data.chunks.project import Project
from megatron_grit.data.chunks.versions import (
    AddedChunks,
    TableDb,
    Version,
    VersionedDb,
    additions,
    check_stored,
    index_files,
    is_among,
    next_version_number,
    read_version,
    removed_documents,
    sorted_keys,
    source_of,
    stored_file,
    version_numbers,
    version_path,
    write_version,
)
from megatron_grit.errors import DataError
from megatron_grit.inference.encoders.protocol import Embedder
from megatron_grit.retrieval.database.index_files import IndexFiles
from megatron_grit.retrieval.database.vectors import ChunkVectors, SegmentVectors
from megatron_grit.retrieval.index.faiss_index import gpus_of_process
from megatron_grit.retrieval.index.manifest import read_manifest
from megatron_grit.retrieval.index.recall import QUESTIONS_FILE, Population, SearchSettings, read_search
from megatron_grit.retrieval.index.search import Found, SearchableIndex, ShardedIndex, SpreadIndex, find_allowed
from megatron_grit.retrieval.work import Worker
from megatron_grit.store.logs import get_logger

log = get_logger(__name__)


def is_grown(project: Project) -> bool:
    """Whether documents were added after the database was built. Building it again would give them other ids."""
    numbers = version_numbers(project.folder)
    return bool(numbers) and len(read_version(project.folder).segments) > 1


def record_version(project: Project, worker: Worker, embedder: Embedder) -> None:
    """Write a version of the index that was built, unless the newest one is it. All processes call it.

    Raises:
        DataError: the index is missing, or of another embedder or other chunks.
    """
    if worker.is_first and not is_grown(project):
        _record(project, embedder)
    worker.barrier()


def _record(project: Project, embedder: Embedder) -> None:
    numbers = version_numbers(project.folder)
    latest = read_version(project.folder) if numbers else None
    try:
        db = ChunkDb(project)
    except DataError:
        if latest is None:
            raise
        return  # documents were appended to a file; opening the version finds out whether nothing else was changed
    files = IndexFiles(project, db, embedder.fingerprint, embedder.dim)
    manifests = [read_manifest(path) for path in files.added]
    read_search(files.search)
    for path, manifest in zip(files.added, manifests, strict=True):
        for what, wanted, found in (
            ("embedder", files.embedder, manifest.embedder),
            ("set of chunks", files.chunks, manifest.chunks),
        ):
            if wanted != found:
                raise DataError(
                    f"was built of another {what}; run --tasks index-build --overwrite index-train", path=path
                )
    digests = [manifest.sha256 for manifest in manifests]
    indexes = [] if latest is None else [file.sha256 for file in latest.segments[0].index]
    if latest is not None and latest.embedder == files.embedder and indexes == digests:
        return
    index = [stored_file(project.folder, path, sha) for path, sha in zip(files.added, digests, strict=True)]
    table = stored_file(project.folder, db.path)
    version = Version(
        number=next_version_number(project.folder),
        sources=[source_of(info.prefix, project.resolve(info.prefix)) for info in db.infos],
        segments=[AddedChunks(table=table, num_chunks=len(db), index=index)],
        trained=stored_file(project.folder, files.trained, read_manifest(files.trained).sha256),
        search=files.search.relative_to(project.folder).as_posix(),
        embedder=files.embedder,
        chunks=files.chunks,
        tombstones=latest.tombstones if latest else None,
        num_tombstones=latest.num_tombstones if latest else 0,
        notes=["built" if latest is None else "built again"],
    )
    write_version(project.folder, version)
    log.info(f"version {version.number} of the database: {version.num_chunks:,} chunks")


def version_to_use(project: Project, worker: Worker, embedder: Embedder) -> Version:
    """The version that the configuration names, or the newest. All processes call it.

    Raises:
        DataError: there is none, or it is of another embedder, or its chunks were changed.
    """
    if project.config.version is None:
        record_version(project, worker, embedder)
    version = read_version(project.folder, project.config.version)
    if version.embedder != embedder.fingerprint:
        raise DataError(
            "is of another embedder; set the embedder it was built with, or run --tasks index-build --overwrite "
            "index-train",
            path=version_path(project.folder, version.number),
        )
    if worker.is_first:  # what is made of damaged chunks would look like any other
        for segment in version.segments:
            check_stored(project.folder, segment.table)
    worker.barrier()
    return version


def check_embedder(db: VersionedDb, embedder: Embedder) -> None:
    """
    Args:
        db: a version.
        embedder: what its index is to be searched with.

    Raises:
        DataError: the index is of another one.
    """
    if db.version.embedder != embedder.fingerprint:
        raise DataError(
            "is of another embedder, or that one was changed since; give the one that the database was built with "
            "(embedder in config.json), or build again with --overwrite embed,index-train",
            path=db.path,
        )


def open_index(
    project: Project,
    version: Version,
    worker: Worker | None = None,
    first_segment: int = 0,
    *,
    population: Population | None = None,
) -> SearchableIndex:
    """The index of a version, ready to search.

    Args:
        project: the database.
        version: the one to search.
        worker: this process among those that search, which all call this; the index is then placed as the
            configuration says. None: a few searches of this process alone, for which it is mapped.
        first_segment: only of the chunks of this segment and those after it, which are some.
        population: whose queries it will get. Where the recall was not measured for these, a warning says so once.
            None: it is searched as for chunks, and nothing is said.

    Raises:
        ConfigError: it cannot be put on a GPU.
        DataError: a file is missing, damaged or was built again since.
    """
    paths = []
    for file in index_files(project.folder, version, first_segment):
        paths.append(check_stored(project.folder, file))
        if read_manifest(paths[-1]).sha256 != file.sha256:
            raise DataError(f"was built again since version {version.number} of the database", path=paths[-1])
    config = project.config
    placement = "mapped" if worker is None else config.index_placement
    gpus = gpus_of_process() if worker is not None and config.index_on_gpu else None
    index: SearchableIndex
    if worker is not None and placement == "spread":
        index = SpreadIndex(paths, worker, version.embedder)
    else:
        index = ShardedIndex.load(paths, mapped=placement == "mapped", embedder=version.embedder)
    if gpus is not None:
        index.to_gpus(gpus)
    search = search_of(project, version, population or "chunks")
    if population is not None and (worker is None or worker.is_first):
        _say_for_whom(project, version, index, population)
    index.set_search(search.nprobe, search.ef_search)
    if version.tombstones is not None:
        removed = sorted_keys(removed_documents(project.folder, version))
        tables = [map_dataset(project.folder / segment.table.path, "chunks") for segment in version.segments]
        index.removed = document_ranges(tables, removed).reshape(-1, 2)
    return index


def nearest_chunks(
    db: VersionedDb, index: SearchableIndex, vectors_QD: np.ndarray, k: int, excluded: np.ndarray | None = None
) -> Found:
    """The chunks of a version that are nearest to vectors, without those of removed documents.

    Args:
        db: the version.
        index: of :func:`open_index`.
        vectors_QD: float32 [Q, D].
        k: chunks of each.
        excluded: keys of further documents that are passed over, ascending.

    Raises:
        DataError: vectors of another width.
    """
    if vectors_QD.ndim != 2 or vectors_QD.shape[1] != index.dim:
        raise DataError(f"queries are of shape {vectors_QD.shape}; the index takes [Q, {index.dim}]")
    own = np.empty(0, dtype=np.uint64) if excluded is None else excluded
    keys = np.union1d(db.tombstones, own)

    def passed_over(rows: np.ndarray) -> np.ndarray:
        ranges = document_ranges(db.tables, own).reshape(1, -1, 2)
        return np.broadcast_to(ranges, (len(rows), *ranges.shape[1:]))

    return find_allowed(index, vectors_QD, max(k, 10), k, lambda rows, ids: ~is_among(db.keys(ids), keys), passed_over)


def version_vectors(db: VersionedDb, worker: Worker, embedder: Embedder) -> SegmentVectors:
    """The vectors of a version's chunks: those that the tasks embed and add wrote, as far as they are there. All
    processes call it."""
    project, parts = db.project, []
    for number, brought in enumerate(additions(project.folder, db.version)):
        table = TableDb(project, project.folder / db.version.segments[number].table.path, db.infos)
        if number:
            folder = added_vectors(project.folder, brought.number)
            parts.append(ChunkVectors(project, table, embedder, brought.chunks, folder))
        else:
            chunks = read_manifest(project.folder / db.version.segments[0].index[0].path).chunks
            parts.append(ChunkVectors(project, table, embedder, chunks))
        parts[-1].look(worker)
    return SegmentVectors(parts)


def added_vectors(folder: Path, number: int) -> Path:
    """Where the vectors of the chunks are that came with a version.

    Args:
        folder: the project directory.
        number: of the version.
    """
    return folder / "embeddings" / f"v{number:04d}"


@dataclass(frozen=True)
class Search:
    """How an index is searched."""

    nprobe: int | None
    ef_search: int | None
    recall: float | None
    """Measured for queries of the kind that is asked. None: it was not measured for these, or with other settings, or
    another query_instruction."""


def questions_path(folder: Path, version: Version) -> Path:
    """The file that says how the index of a version is searched for questions, which may not be there."""
    return (folder / version.search).with_name(QUESTIONS_FILE)


def searches_of(folder: Path, version: Version) -> dict[Population, SearchSettings]:
    """How the index of a version is searched for each population for which that was measured.

    Raises:
        DataError: a file that says so is missing or cannot be read.
    """
    found = [_settings_for(folder, version, population) for population in get_args(Population)]
    return {settings.population: settings for settings in found}


def _settings_for(folder: Path, version: Version, population: Population) -> SearchSettings:
    """Those that were chosen for a population, or for another one where nothing was measured for it."""
    beside = questions_path(folder, version)
    return read_search(beside if population == "questions" and beside.is_file() else folder / version.search)


def search_of(project: Project, version: Version, population: Population = "chunks") -> Search:
    """As the configuration says, else as it was chosen for queries of this population, or of another one where it was
    not measured for these.

    Raises:
        DataError: the file that says so is missing or cannot be read.
    """
    built = _settings_for(project.folder, version, population)
    nprobe, ef_search = project.config.nprobe, project.config.ef_search
    same = nprobe in (None, built.nprobe) and ef_search in (None, built.ef_search)
    same &= project.config.query_instruction == built.query_instruction
    return Search(
        built.nprobe if nprobe is None else nprobe,
        built.ef_search if ef_search is None else ef_search,
        built.recall if same and population == built.population else None,
    )


def _say_for_whom(project: Project, version: Version, index: SearchableIndex, population: Population) -> None:
    """Warn where the recall is a promise for other queries than those that are asked."""
    built = _settings_for(project.folder, version, population)
    if built.population == population or index.factory == "Flat":  # which finds all of them, whoever asks
        return
    remedy = "recall --recall_queries FILE" if population == "questions" else "index-add --overwrite index-add"
    _warn_once(
        f"{project.folder}: the recall {built.recall:.3f} was measured on {built.queries or built.population}; what "
        f"{population} find was not measured, and the search was not chosen for them; measure it: megatron-grit "
        f"build-db --project-dir {project.folder} --tasks {remedy}"
    )


@functools.cache
def _warn_once(text: str) -> None:
    log.warning(text)


def next_version(folder: Path, before: Version, note: str, **changes: Any) -> Version:
    """Write the version that follows one, with what was changed. In one process."""
    version = replace(before, number=before.number + 1, notes=[note], **changes)
    write_version(folder, version)
    return version
