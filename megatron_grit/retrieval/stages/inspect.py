"""What a database holds, to look at: counts, chunks, documents, neighbors, and searches by text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_grit.config.database.schema import load_project_config
from megatron_grit.data.chunks.chunk_db import DATASET, DOCUMENT, ChunkDb
from megatron_grit.data.chunks.neighbor_table import NeighborTable, read_table_manifest
from megatron_grit.data.chunks.project import Project
from megatron_grit.data.chunks.versions import (
    Version,
    VersionedDb,
    check_stored,
    is_among,
    read_version,
    version_numbers,
)
from megatron_grit.errors import ConfigError, DataError
from megatron_grit.inference.encoders.protocol import Embedder
from megatron_grit.retrieval.database.queried import tables_of
from megatron_grit.retrieval.database.verification import verify_files
from megatron_grit.retrieval.database.versions import check_embedder, nearest_chunks, open_index
from megatron_grit.retrieval.stages.db_build import report_lines as db_build_lines
from megatron_grit.retrieval.stages.embed import project_embedder
from megatron_grit.retrieval.stages.task import MOST_TO_COUNT, Report
from megatron_grit.retrieval.stages.tasks import TASKS
from megatron_grit.retrieval.stages.tombstone import is_number, parse_documents


class Inspector:
    """A database, open to look at; one that has chunks and no index yet, too.

    Args:
        folder: the project directory.
        version: which state of it. None: that of config.json, or the newest.

    Raises:
        DataError: there is no database, or a file was changed.
    """

    def __init__(self, folder: Path, version: int | None = None) -> None:
        config = load_project_config(folder)
        if config is None:
            raise DataError("is no project directory: it has no config.json", path=folder)
        self.project = Project(folder, config)
        self.asked = config.version if version is None else version
        self.version: Version | None = None
        self.db: ChunkDb
        if self.asked is None and not version_numbers(folder):
            self.db = ChunkDb(self.project)
        else:
            self.version = read_version(folder, self.asked)
            self.db = VersionedDb(self.project, self.version)

    def summary(self, *, verify: bool = False) -> Report:
        """Counts, versions, index and tables of neighbors.

        Args:
            verify: read every file and compare its checksum; before there is a version, compare the chunks with the
                blocks that they were merged of as well.

        Raises:
            DataError: a file is missing or damaged.
        """
        folder, version = self.project.folder, self.version
        if version is not None:
            for file in version.files():
                check_stored(folder, file)
        counts = self._chunks_of_datasets()
        summary: Report = {
            "project": str(folder),
            "version": version.number if version else None,
            "num_chunks": len(self.db),
            "datasets": [
                {"number": number, "prefix": info.prefix, "num_documents": info.n_docs, "num_chunks": count}
                for number, (info, count) in enumerate(zip(self.db.infos, counts, strict=True))
            ],
            "verified": verify,
            "without_checksum": verify_files(self.project, version) if verify else [],
        }
        for task in TASKS.values():
            summary |= task.describe(self.db, version, verify=verify)
        return summary

    def _chunks_of_datasets(self) -> list[int] | list[None]:
        """How many chunks each dataset has; None each in a database that is too large to count."""
        num_datasets = len(self.db.infos)
        if len(self.db) > MOST_TO_COUNT:
            return [None] * num_datasets
        datasets: np.ndarray = np.asarray(self.db.rows[:, DATASET], dtype=np.int64)
        return np.bincount(datasets, minlength=num_datasets)[:num_datasets].tolist()

    def chunk(self, number: int) -> Report:
        """As :func:`describe_chunk`, of this version."""
        return describe_chunk(self.db, number)

    def document(self, name: str) -> Report:
        """A document and its chunks.

        Args:
            name: DATASET:DOCUMENT, as the task tombstone takes them.

        Raises:
            ConfigError: no such document, or several.
        """
        found = parse_documents(name, [(info.prefix, info.n_docs) for info in self.db.infos], "document")
        if len(found) > 1:
            raise ConfigError(f"document {name!r}: names {len(found)} documents; give one at a time")
        ((dataset, document),) = found
        file = self.project.file(dataset)
        chunks = []
        for first in range(0, len(self.db), 1 << 20):
            rows = self.db.rows[first : first + (1 << 20)]
            chunks += (np.flatnonzero((rows[:, DATASET] == dataset) & (rows[:, DOCUMENT] == document)) + first).tolist()
        return {
            "prefix": self.db.infos[dataset].prefix,
            "document": document,
            "chunks": chunks,
            "text": self.project.tokenizer.decode(file.read(*file.sequences(document)).tolist()),
        }

    def neighbors(self, name: str, k: int) -> Report:
        """A chunk that is trained on and its neighbors, from the newest table of its file, up to the version that was
        asked for.

        Args:
            name: PREFIX:DOCUMENT:OFFSET; the prefix as it was queried, or the last part of it.
            k: neighbors.

        Raises:
            ConfigError: no chunk begins there.
            DataError: neighbors were not searched.
        """
        wanted, _, offset = name.rpartition(":")
        wanted, _, document = wanted.rpartition(":")
        there = tables_of(self.project, up_to=self.asked)
        tables = {prefix: folder for prefix, folder in there.items() if wanted in (prefix, Path(prefix).name)}
        if len(tables) != 1 or not is_number(document) or not is_number(offset):
            known = ", ".join(there) or "none; run --tasks query-neighbors"
            which = "" if self.asked is None else f"up to version {self.asked} "
            raise ConfigError(f"neighbors {name!r}: give PREFIX:DOCUMENT:OFFSET; {which}there are tables of {known}")
        ((prefix, folder),) = tables.items()
        number = read_table_manifest(folder).version
        db = VersionedDb(self.project, read_version(self.project.folder, number))
        table = NeighborTable(folder, db.rows, db.version.chunks)
        place = int(document), int(offset)
        try:
            ids = table.read([place], [(dataset, place[0]) for dataset in table.manifest.datasets], k)[0].tolist()
        except IndexError as error:
            length = table.manifest.chunk_length
            raise ConfigError(f"neighbors {name!r}: {error}; chunks begin at multiples of {length}") from None
        file = self.project.open(prefix)
        first, last = file.sequences(place[0])
        left = int(file.lengths[first:last].sum(dtype=np.int64)) - place[1]
        tokens = file.read(first, last, place[1], min(left, table.manifest.chunk_length))
        return {
            "prefix": prefix,
            "document": place[0],
            "start": place[1],
            "text": self.project.tokenizer.decode(tokens.tolist()),
            "version": number,
            "neighbors": [describe_chunk(db, chunk) for chunk in ids if chunk >= 0],
        }

    def embedder(self) -> Embedder:
        """What texts are embedded with to search.

        Raises:
            ConfigError: there is no index yet, or the embedder cannot be loaded.
        """
        if self.version is None:
            raise ConfigError(f"{self.project.folder}: there is no index yet to search in; run --tasks build")
        return project_embedder(self.project.config, alone=True)

    def search(self, text: str, embedder: Embedder, k: int) -> Report:
        """The chunks that are nearest to a text, removed ones left out.

        Args:
            text: what is searched for.
            embedder: that of the index.
            k: chunks.

        Raises:
            DataError: the index is of another embedder.
        """
        db = self.db
        assert self.version is not None and isinstance(db, VersionedDb), "self.embedder() tells whether there is one"
        check_embedder(db, embedder)
        index = open_index(self.project, self.version, population="questions")
        scores, ids = nearest_chunks(db, index, embedder.embed([text], "query"), k)
        found = zip(ids[0].tolist(), scores[0].tolist(), strict=True)
        hits = [describe_chunk(db, number) | {"score": score} for number, score in found if number >= 0]
        return {"query": text, "metric": index.metric, "hits": hits}


def describe_chunk(db: ChunkDb, number: int) -> Report:
    """A chunk: where it is, its text and what follows it in its document.

    Raises:
        ConfigError: no such chunk.
    """
    if not 0 <= number < len(db):
        raise ConfigError(f"chunk {number}: the database has chunks 0 to {len(db) - 1}")
    dataset, document, start, stop, _ = db.rows[number].tolist()
    whole = db.tokens(number, num_tokens=2 * db.project.config.chunk_length)
    decode = db.project.tokenizer.decode
    removed = isinstance(db, VersionedDb) and bool(is_among(db.keys(np.array([number])), db.tombstones)[0])
    return {
        "chunk": number,
        "place": db.describe(number),
        "prefix": db.infos[dataset].prefix,
        "document": document,
        "start": start,
        "stop": stop,
        "removed": removed,
        "text": decode(whole[: stop - start].tolist()),
        "continuation": decode(whole[stop - start :].tolist()),
    }


@dataclass(frozen=True, kw_only=True)
class Questions:
    """What is asked of a database."""

    chunks: Sequence[int] = ()
    """Ids."""
    documents: Sequence[str] = ()
    """DATASET:DOCUMENT of each."""
    neighbors: Sequence[str] = ()
    """PREFIX:DOCUMENT:OFFSET of each."""
    searches: Sequence[str] = ()
    """Texts to search for."""
    k: int = 3
    """Neighbors of each chunk, and hits of each search."""


def inspect_database(
    folder: Path, questions: Questions | None = None, *, version: int | None = None, verify: bool = False
) -> Report:
    """What a database holds of what is asked for; its summary where nothing is.

    Args:
        folder: the project directory.
        questions: None: none.
        version: which state of it. None: the newest.
        verify: compare all files with their checksums.

    Raises:
        ConfigError: something that is not there.
        DataError: a file is missing or damaged.
    """
    asked = questions or Questions()
    if asked.k < 1:
        raise ConfigError(f"num must be at least 1, not {asked.k}")
    inspector = Inspector(folder, version)
    report: Report = {}
    if verify or not (asked.chunks or asked.documents or asked.neighbors or asked.searches):
        report["summary"] = inspector.summary(verify=verify)
    report["chunks"] = [inspector.chunk(number) for number in asked.chunks]
    report["documents"] = [inspector.document(name) for name in asked.documents]
    report["neighbors"] = [inspector.neighbors(name, asked.k) for name in asked.neighbors]
    embedder = inspector.embedder() if asked.searches else None
    report["searches"] = [inspector.search(text, embedder, asked.k) for text in asked.searches if embedder is not None]
    return {name: value for name, value in report.items() if value}


def report_lines(report: Report) -> Iterator[str]:
    """A report of :func:`inspect_database` to read."""
    if "summary" in report:
        yield from _summary_lines(report["summary"])
    for chunk in report.get("chunks", []):
        yield from _chunk_lines(chunk, "")
    for document in report.get("documents", []):
        yield f"{document['prefix']}#{document['document']}, {len(document['chunks'])} chunks: {document['chunks']}"
        yield document["text"]
    for found in report.get("neighbors", []):
        yield f"{found['prefix']}#{found['document']}:{found['start']}, version {found['version']} of the database"
        yield f"  {_one_line(found['text'])}"
        for rank, chunk in enumerate(found["neighbors"], 1):
            yield from _chunk_lines(chunk, f"{rank}. ")
        if not found["neighbors"]:
            yield "no neighbors"
    for search in report.get("searches", []):
        yield f"{search['query']!r}, nearest first ({search['metric']}):"
        for rank, chunk in enumerate(search["hits"], 1):
            yield from _chunk_lines(chunk, f"{rank}. {chunk['score']:.4f} ")


def _summary_lines(summary: Report) -> Iterator[str]:
    state = "no index yet" if summary["version"] is None else f"version {summary['version']}"
    yield f"{summary['project']}: {state}, {summary['num_chunks']:,} chunks"
    if summary["num_removed_documents"]:
        yield f"removed: {summary['num_removed_documents']:,} documents, {summary['num_removed_chunks']} chunks"
    for dataset in summary["datasets"]:
        chunks = "" if dataset["num_chunks"] is None else f", {dataset['num_chunks']:,} chunks"
        yield f"dataset {dataset['number']} {dataset['prefix']}: {dataset['num_documents']:,} documents{chunks}"
    if summary["built"] is not None:
        yield from (f"db-build, {line}" for line in db_build_lines(summary["built"]["datasets"]))
    if summary["index"] is not None:
        yield from _index_lines(summary["index"])
    for table in summary["tables"]:
        short = ""
        if table["num_short"]:
            short = f", {table['num_short']:,} with fewer ({table['num_none']:,} with none)"
        if table["num_copies"]:
            short += f", {table['num_copies']:,} copies left out"
        recall = "not measured" if table["recall"] is None else f"{table['recall']:.3f}"
        yield (
            f"neighbors for {table['prefix']}: {table['num_places']:,} chunks x {table['num_neighbors']}{short}, "
            f"version {table['version']}, nprobe {table['nprobe']}, recall {recall}, query/{table['folder']}"
        )
    for version in summary["versions"]:
        yield f"version {version['number']}: {version['num_chunks']:,} chunks; {', '.join(version['notes'])}"
    if summary["verified"]:
        has_index = summary["index"] is not None
        without = summary["without_checksum"]
        yield f"all files{' that have one' if without else ''} match their checksum" + (
            "" if has_index else "; the chunks are those that were cut"
        )
        if without:
            more = f" and {len(without) - 5:,} more" if len(without) > 5 else ""
            yield (
                "without a checksum, as earlier releases wrote them, and so not compared: "
                f"{', '.join(without[:5])}{more}"
            )


def _index_lines(index: Report) -> Iterator[str]:
    yield (
        f"index {index['factory']} ({index['metric']}, {index['dim']} channels): {index['num_vectors']:,} vectors in "
        f"{index['num_files']} files of {index['bytes'] / 2**20:.1f} MiB, trained on {index['num_trained']:,}"
    )
    for population, search in index["searches"].items():
        yield (
            f"search for {population}: nprobe {search['nprobe']}, ef_search {search['ef_search']}; "
            f"recall@{search['recall_at']} {search['recall']:.3f} ({search['recall_low']:.3f} to "
            f"{search['recall_high']:.3f}), measured with {search['num_queries']:,} {search['queries']}"
            + ("" if search["version"] is None else f" in version {search['version']}")
        )
    if "questions" not in index["searches"]:
        yield "search for questions: not measured; --tasks recall --recall_queries FILE does"


def _chunk_lines(chunk: Report, head: str) -> Iterator[str]:
    removed = " (removed)" if chunk["removed"] else ""
    yield f"{head}chunk {chunk['chunk']} {chunk['place']}{removed}"
    yield f"  {_one_line(chunk['text'])}"
    if chunk["continuation"]:
        yield f"  ... {_one_line(chunk['continuation'])}"


def _one_line(text: str) -> str:
    return " ".join(text.split())
