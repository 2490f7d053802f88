"""Every file of a database read whole and compared with what is known of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from megatron_grit.data.chunks.chunk_db import map_dataset
from megatron_grit.data.chunks.neighbor_table import NeighborTable, read_table_manifest
from megatron_grit.data.chunks.project import Project
from megatron_grit.data.chunks.versions import (
    Version,
    VersionedDb,
    check_stored,
    read_version,
    version_numbers,
)
from megatron_grit.errors import DataError
from megatron_grit.retrieval.index.manifest import is_whole, read_manifest
from megatron_grit.store.blocks import DAMAGED, check_arrays
from megatron_grit.store.content import content_digest, thoroughly
from megatron_grit.store.sealed import CHECKSUM, unseal

FOLDERS = ("db", "embeddings", "index", "query", "lexical")
"""Of a project directory, what tasks and searches write. What else lies there is the user's: documents, an embedder."""


def verify_files(project: Project, version: Version | None) -> list[str]:
    """Read every file that tasks wrote into a project directory, and the indexed files that it is of.

    Args:
        project: the database.
        version: whose files are compared beside those that hold their own checksums. None: there is none yet.

    Returns:
        Files that hold no checksum and that no other file tells of, as those of earlier releases: not compared.

    Raises:
        DataError: a file is missing or damaged.
    """
    folder, unknown = project.folder, list[Path]()
    with thoroughly():
        known = set[Path]()
        if version is not None:
            VersionedDb(project, version)
            known = {check_stored(folder, file) for file in version.files()}
        for path in _files(folder, ".hdf5"):
            if not _has_checksum(path):
                unknown.append(path)
        for path in _files(folder, ".json"):
            if path.relative_to(folder).parts[0] != "lexical" and not _is_sealed(path):
                unknown.append(path)
        for path in _files(folder, ".faissindex"):
            if not is_whole(path, read_manifest(path)):
                raise DataError("does not match its checksum", path=path)
        _verify_tables(project)
        _verify_words(folder)
    return [path.relative_to(folder).as_posix() for path in unknown if path not in known]


def _files(folder: Path, ending: str) -> Iterator[Path]:
    """Those of ``config.json`` and :data:`FOLDERS`."""
    inside = [path for name in FOLDERS for path in (folder / name).rglob(f"*{ending}")]
    for path in sorted([*inside, *folder.glob(f"config{ending}")]):
        # What no run finished, and what versions were before they were given up.
        if not any(part.startswith(".") for part in path.relative_to(folder).parts) and path.parent.name != "given_up":
            yield path


def _has_checksum(path: Path) -> bool:
    import h5py

    try:
        with h5py.File(path, "r") as file:
            of_arrays, of_rows = "sha256" in file.attrs, "rows_sha256" in file.attrs
    except DAMAGED as error:
        raise DataError(f"cannot be read ({str(error)[:200]}); delete it and run its task again", path=path) from None
    if of_arrays:
        check_arrays(path)
    elif of_rows:
        map_dataset(path, "chunks")
    return of_arrays or of_rows


def _is_sealed(path: Path) -> bool:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        entries = values if isinstance(values, list) else [values]
        for entry in entries:
            unseal(entry)
    except (OSError, ValueError) as error:
        raise DataError(f"cannot be read ({error})", path=path) from None
    return all(CHECKSUM in entry for entry in entries)


def _verify_tables(project: Project) -> None:
    """Tables of neighbors, each with the version that its ids are of and the documents that it is for."""
    numbers = version_numbers(project.folder)
    for path in sorted(project.folder.glob("query/*/table.json")):
        manifest = read_table_manifest(path.parent)
        number = manifest.version
        database = read_version(project.folder, number).chunks if number in numbers else None
        table = NeighborTable(path.parent, np.empty((0, 2)), database)
        table.check_source(project.resolve(manifest.source.prefix))


def _verify_words(folder: Path) -> None:
    for path in sorted(folder.glob("lexical/*/files.json")):
        for name, entry in unseal(json.loads(path.read_text(encoding="utf-8"))).items():
            if not (path.parent / name).is_file() or content_digest(path.parent / name) != entry["sha256"]:
                raise DataError("was changed; delete its folder, and it is made again", path=path.parent / name)
