"""The states of a database: what it held when, and how to open it as it was.

A database grows by segments: a table of new chunks, whose ids follow those that are there, and index files of their
own. Nothing that an earlier state is made of is touched, so a version is a list of files. Removed documents are
tombstones: their chunks keep their ids, and searches pass them over.

``db/versions/NNNN.json`` holds a version; a new one is written for each change.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np

from megatron_grit.config.database.schema import version_numbers
from megatron_grit.data.chunks.chunk_db import DATASET, DOCUMENT, ChunkDb, map_dataset
from megatron_grit.data.chunks.joined_rows import JoinedRows
from megatron_grit.data.chunks.project import DatasetInfo, Project, fingerprint, sha256_of_bin
from megatron_grit.data.indexed.reader import IndexedFile
from megatron_grit.errors import DataError
from megatron_grit.store.content import content_digest, content_part, thoroughly
from megatron_grit.store.digest import digest_of_rows, sha256_of_file
from megatron_grit.store.sealed import read_sealed, write_sealed

_REMEDY = "--tasks db-build makes tables of chunks again, index-add index files; put another file back from a copy"
_GIVEN_UP = "given_up"
"""Folder of versions that were built over."""


@dataclass(kw_only=True)
class Source:
    """A dataset as a version holds it: the first documents of its file, or all."""

    prefix: str
    fingerprint: str
    """Of the whole file when the version was made."""
    num_documents: int
    num_sequences: int
    bin_bytes: int
    bin_mtime_ns: int
    """When the version was made."""
    bin_sha256: str
    index_sha256: str
    """Of the type of the tokens, the lengths of the sequences and the first sequence of each document."""


@dataclass(kw_only=True)
class StoredFile:
    """A file of a version. Paths are relative to the project directory."""

    path: str
    bytes: int
    sha256: str


@dataclass(kw_only=True)
class AddedChunks:
    """Chunks that came at one time."""

    table: StoredFile
    num_chunks: int
    index: list[StoredFile]
    """Files over these chunks; after the task compact also over those of the next segments, or none."""
    num_covered: int = 1
    """Segments that ``index`` is over, from this one on; 0 where an earlier one's is."""


@dataclass(kw_only=True)
class Version:
    """One state of a database."""

    number: int
    sources: list[Source]
    segments: list[AddedChunks]
    trained: StoredFile
    """The trained index without vectors, with which new chunks are encoded."""
    search: str
    """The file that says how the index is searched, and with what recall."""
    embedder: str
    """Fingerprint."""
    chunks: str
    """Fingerprint of all chunks."""
    tombstones: StoredFile | None = None
    num_tombstones: int = 0
    notes: list[str] = field(default_factory=list)
    """What was changed."""

    @property
    def num_chunks(self) -> int:
        """Chunks, those of removed documents included."""
        return sum(segment.num_chunks for segment in self.segments)

    def files(self) -> Iterator[StoredFile]:
        """All files that it is made of."""
        yield self.trained
        for segment in self.segments:
            yield segment.table
            yield from segment.index
        if self.tombstones is not None:
            yield self.tombstones


def version_path(folder: Path, number: int) -> Path:
    """File of a version."""
    return folder / "db" / "versions" / f"{number:04d}.json"


def next_version_number(folder: Path) -> int:
    """Number of a version that would be written now; none is used twice."""
    return 1 + max([*version_numbers(folder), *_given_up(folder)], default=0)


def give_up_versions(folder: Path) -> None:
    """Take away all versions, whose files are about to be made anew. Their numbers stay used."""
    for number in version_numbers(folder):
        path = version_path(folder, number)
        (path.parent / _GIVEN_UP).mkdir(exist_ok=True)
        path.replace(path.parent / _GIVEN_UP / path.name)


def _given_up(folder: Path) -> list[int]:
    paths = (folder / "db" / "versions" / _GIVEN_UP).glob("*.json")
    return [int(path.stem) for path in paths if path.stem.isdigit()]


def read_version(folder: Path, number: int | None = None) -> Version:
    """A version of a project.

    Args:
        folder: the project directory.
        number: which. None: the newest.

    Raises:
        DataError: there is none of this number, or it cannot be read.
    """
    numbers = version_numbers(folder)
    path = version_path(folder, number if number is not None else max(numbers, default=1))
    if not path.is_file():
        gone = "was given up when the database was built again" if number in _given_up(folder) else "is missing"
        raise DataError(
            f"{gone}; versions that are there: {', '.join(map(str, numbers)) or 'none, run --tasks build'}",
            path=path,
        )
    try:
        values: dict[str, Any] = read_sealed(path)
        values["sources"] = [Source(**source) for source in values["sources"]]
        values["segments"] = [_segment(segment) for segment in values["segments"]]
        values["trained"] = StoredFile(**values["trained"])
        if values["tombstones"] is not None:
            values["tombstones"] = StoredFile(**values["tombstones"])
        return Version(**values)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"cannot be read ({error}); put it back from a copy", path=path) from None


def _segment(values: dict[str, Any]) -> AddedChunks:
    index = [StoredFile(**file) for file in values["index"]]
    return AddedChunks(**values | {"table": StoredFile(**values["table"]), "index": index})


def write_version(folder: Path, version: Version) -> None:
    """Write a version; it is there when its file is."""
    write_sealed(version_path(folder, version.number), dataclasses.asdict(version))


def stored_file(folder: Path, path: Path, sha256: str | None = None) -> StoredFile:
    """A file of a project with its size and checksum, which is computed where it is not given."""
    name = path.relative_to(folder).as_posix()
    return StoredFile(path=name, bytes=path.stat().st_size, sha256=sha256 or content_digest(path))


def check_stored(folder: Path, file: StoredFile, *, thorough: bool = False) -> Path:
    """Path of a version's file.

    Args:
        folder: the project directory.
        file: of a version.
        thorough: read all of it, not only samples of what is known of it.

    Raises:
        DataError: it is missing or was changed.
    """
    path = folder / file.path
    if not path.is_file():
        raise DataError(f"is missing; a version of the database needs it ({_REMEDY})", path=path)
    with thoroughly() if thorough else nullcontext():
        is_same = path.stat().st_size == file.bytes and content_digest(path) == file.sha256
    if not is_same:
        raise DataError(
            f"was changed since this version of the database was made ({_REMEDY})",
            path=path,
        )
    return path


def is_damaged(folder: Path, path: Path) -> bool:
    """Whether a file belongs to the newest version and is no longer what it was.

    Raises:
        DataError: the version cannot be read.
    """
    files = read_version(folder).files() if version_numbers(folder) else iter(())
    return any(folder / file.path == path and content_digest(path) != file.sha256 for file in files)


def additions(folder: Path, version: Version) -> list[Version]:
    """For each segment of a version the one that brought it; the first of several with the same chunks.

    Raises:
        DataError: one cannot be read.
    """
    earlier = [read_version(folder, number) for number in version_numbers(folder) if number <= version.number]
    tables = [segment.table.sha256 for segment in version.segments]
    found: dict[int, Version] = {}
    for other in earlier:
        count = len(other.segments)
        if [segment.table.sha256 for segment in other.segments] == tables[:count]:
            found.setdefault(count, other)
    return [found.get(number + 1, version) for number in range(len(tables))]


def index_files(folder: Path, version: Version, first: int = 0) -> list[StoredFile]:
    """Files of the index over the chunks of segment ``first`` and those after it, and no others. Where the task compact
    joined them with earlier ones, they are those that the additions made.

    Raises:
        DataError: a version cannot be read.
    """
    own = additions(folder, version) if first else []
    files, number = [], first
    while number < len(version.segments):
        segment = version.segments[number]
        if not segment.num_covered:
            segment = own[number].segments[number]
        files += segment.index
        number += segment.num_covered
    return files


def removed_documents(folder: Path, version: Version) -> np.ndarray:
    """(dataset, document) of each removed document, int64 [n, 2].

    Raises:
        DataError: their file is missing or was changed.
    """
    if version.tombstones is None:
        return np.empty((0, 2), dtype=np.int64)
    pairs: np.ndarray = np.load(check_stored(folder, version.tombstones), allow_pickle=False)
    return pairs


def source_of(prefix: str, path: Path) -> Source:
    """A dataset as it is now.

    Raises:
        DataError: it is missing or damaged.
    """
    file = IndexedFile(path)
    return Source(
        prefix=prefix,
        fingerprint=fingerprint(path),
        num_documents=file.num_documents,
        num_sequences=file.num_sequences,
        bin_bytes=file.bin_bytes,
        bin_mtime_ns=file.bin_path.stat().st_mtime_ns,
        bin_sha256=sha256_of_bin(path),
        index_sha256=_index_digest(file, file.num_sequences, file.num_documents),
    )


def is_unchanged(path: Path, source: Source) -> bool:
    """Whether an indexed file is a source and nothing more.

    Raises:
        DataError: it is not what its ``.json`` says.
    """
    return fingerprint(path) == source.fingerprint and sha256_of_bin(path) == source.bin_sha256


def begins_with(path: Path, source: Source) -> bool:
    """Whether an indexed file begins with the documents of a source. What is found of a file is remembered.

    Raises:
        DataError: it is not what its ``.json`` says, or its index does not hold together.
    """
    if is_unchanged(path, source):
        return True
    file, size = IndexedFile(path), source.bin_bytes
    return (
        file.num_documents >= source.num_documents
        and file.num_sequences >= source.num_sequences
        and file.bin_bytes >= size
        and _index_digest(file, source.num_sequences, source.num_documents) == source.index_sha256
        and content_part(file.bin_path, f"first {size} bytes", lambda: sha256_of_file(file.bin_path, size))
        == source.bin_sha256
    )


def shares_documents(path: Path, own: Path, source: Source) -> bool:
    """Whether an indexed file is a source, the first documents of it, or the source and more after it. Document ``n``
    of one is then document ``n`` of the other.

    Args:
        path: of the file.
        own: of the file of the source, which begins with it.
        source: what is compared.
    """
    if path.resolve() == own.resolve():
        return True
    file = IndexedFile(path)
    if not file.num_documents or not source.num_documents:
        return False
    if file.num_documents >= source.num_documents:
        return begins_with(path, source)
    known, counts = IndexedFile(own), (file.num_sequences, file.num_documents)
    if known.num_sequences < file.num_sequences or _index_digest(known, *counts) != _index_digest(file, *counts):
        return False  # known without reading a ``.bin``
    return begins_with(own, source_of(str(path), path))


def _index_digest(file: IndexedFile, num_sequences: int, num_documents: int) -> str:
    """Of the first sequences and documents; pointers are compared with the lengths that they follow from."""

    def compute() -> str:
        file.check_index()
        arrays = (file.lengths[:num_sequences], file.documents[: num_documents + 1])
        return digest_of_rows(*arrays, prefix=file.dtype.str.encode())

    return content_part(file.idx_path, f"{num_sequences} sequences, {num_documents} documents", compute)


def document_keys(datasets: np.ndarray, documents: np.ndarray) -> np.ndarray:
    """One uint64 for each dataset and document."""
    return (datasets.astype(np.uint64) << np.uint64(32)) | documents.astype(np.uint64)


def sorted_keys(documents: Sequence[tuple[int, int]] | np.ndarray) -> np.ndarray:
    """Keys of (dataset, document) pairs, ascending, each once."""
    pairs = np.asarray(documents, dtype=np.int64).reshape(-1, 2)
    return np.unique(document_keys(pairs[:, 0], pairs[:, 1]))


def is_among(keys: np.ndarray, ascending: np.ndarray) -> np.ndarray:
    """Whether each key is in an ascending array: bool of the shape of ``keys``."""
    if not len(ascending):
        return np.zeros(keys.shape, dtype=bool)
    places = np.minimum(np.searchsorted(ascending, keys), len(ascending) - 1)
    return np.asarray(ascending[places] == keys)


def infos_of(sources: Sequence[Source]) -> list[DatasetInfo]:
    """Datasets as a database lists them."""
    return [
        DatasetInfo(prefix=source.prefix, fingerprint=source.fingerprint, n_docs=source.num_documents)
        for source in sources
    ]


class TableDb(ChunkDb):
    """Chunks of one table.

    Args:
        project: where the documents are.
        path: the table.
        infos: of the datasets.
    """

    def __init__(self, project: Project, path: Path, infos: list[DatasetInfo]) -> None:
        self.project, self.path, self.infos = project, path, infos
        self.rows = map_dataset(path, "chunks")


class VersionedDb(ChunkDb):
    """Chunks of one version of a database, whatever was added later.

    Args:
        project: where it is.
        version: of :func:`read_version`.

    Attributes:
        version: the one that was opened.
        tables: what ``rows`` is made of, each in the order of dataset and document.
        tombstones: uint64, ascending: keys of removed documents, of :func:`document_keys`.

    Raises:
        DataError: a file is missing or was changed; documents of the version were changed. Documents may have been
            appended.
    """

    def __init__(self, project: Project, version: Version) -> None:
        self.project, self.version = project, version
        self.path = version_path(project.folder, version.number)
        names = project.config.data_paths[: len(version.sources)]
        if names != [source.prefix for source in version.sources]:
            raise DataError(
                f"is of {[source.prefix for source in version.sources]}, data_paths begins with {names}; new datasets "
                "are appended to data_paths, and none is taken out",
                path=self.path,
            )
        for number, source in enumerate(version.sources):
            self._check_source(number, source)
        self.infos = infos_of(version.sources)
        tables = []
        for segment in version.segments:
            tables.append(map_dataset(check_stored(project.folder, segment.table), "chunks", compare=False))
            if len(tables[-1]) != segment.num_chunks:
                raise DataError(f"holds {len(tables[-1])} chunks, not {segment.num_chunks}", path=self.path)
        self.tables = tables
        self.rows = tables[0] if len(tables) == 1 else cast(np.ndarray, JoinedRows(tables))
        self.tombstones = sorted_keys(removed_documents(project.folder, version))

    def _check_source(self, number: int, source: Source) -> None:
        path = self.project.resolve(source.prefix)
        if is_unchanged(path, source):
            return
        # A later version was made of a file that was seen to begin with this one's documents.
        for later in version_numbers(self.project.folder):
            if later > self.version.number and is_unchanged(
                path, read_version(self.project.folder, later).sources[number]
            ):
                return
        if not begins_with(path, source):
            raise DataError(
                f"no longer begins with the {source.num_documents} documents of version {self.version.number} of the "
                "database; put the old file back, or build another database",
                path=path,
            )

    def keys(self, chunks: np.ndarray) -> np.ndarray:
        """Keys of the documents of chunks; those of chunk 0 where an id is negative."""
        rows = self.rows[np.maximum(chunks, 0)]
        return document_keys(rows[..., DATASET], rows[..., DOCUMENT])

    def chunks_of(self, keys: np.ndarray) -> np.ndarray:
        """Ids of the chunks of some documents, ascending: int64 [n]. Reads the whole table, in parts.

        Args:
            keys: of the documents, ascending, of :func:`document_keys`.
        """
        found, step = [np.empty(0, dtype=np.int64)], 1 << 20
        for start in range(0, len(self) if len(keys) else 0, step):
            rows = self.rows[start : start + step]
            found.append(np.flatnonzero(is_among(document_keys(rows[:, DATASET], rows[:, DOCUMENT]), keys)) + start)
        return np.concatenate(found)

    def dataset_numbers(self, path: Path) -> list[int]:
        """Datasets of the database that hold documents of a file under the same numbers, as of
        :func:`shares_documents`."""
        return [
            number
            for number, source in enumerate(self.version.sources)
            if shares_documents(path, self.project.resolve(source.prefix), source)
        ]


def built_version(folder: Path) -> Version | None:
    """The newest version of a database that was not added to; None where nothing was added since, or there is none."""
    versions = [read_version(folder, number) for number in version_numbers(folder)]
    if not versions or len(versions[-1].segments) == 1:
        return None
    return next(version for version in reversed(versions) if len(version.segments) == 1)


def built_datasets(project: Project) -> list[DatasetInfo]:
    """The datasets that the database was first built of, whatever was added since.

    Raises:
        DataError: the files no longer begin with these documents.
    """
    version = built_version(project.folder)
    return project.datasets() if version is None else VersionedDb(project, version).infos


def built_chunks(project: Project, part: str = "train") -> ChunkDb:
    """The chunks that the database was first built of, whatever was added since.

    Raises:
        DataError: there are none, or the files no longer begin with these documents.
    """
    version = built_version(project.folder)
    if version is None:
        return ChunkDb(project, part)
    VersionedDb(project, version)
    return ChunkDb(project, part, project.listed())
