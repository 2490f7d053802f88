"""Databases that grow: versions recorded, documents added without training the index again, documents removed."""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_grit.data.chunks.chunk_db import ChunkDb
from megatron_grit.data.chunks.chunking import visible_tokens
from megatron_grit.data.chunks.project import Project
from megatron_grit.data.chunks.versions import (
    AddedChunks,
    Source,
    StoredFile,
    TableDb,
    Version,
    VersionedDb,
    begins_with,
    check_stored,
    infos_of,
    next_version_number,
    read_version,
    removed_documents,
    source_of,
    stored_file,
    version_numbers,
    version_path,
    write_version,
)
from megatron_grit.errors import ConfigError, DataError
from megatron_grit.inference.encoders.protocol import Embedder
from megatron_grit.retrieval.dedup.duplicates import ChunkBlock, DuplicateSearch
from megatron_grit.retrieval.index.faiss_index import VectorIndex, gpus_of_process
from megatron_grit.retrieval.index.manifest import read_manifest
from megatron_grit.retrieval.index.search import SearchableIndex, ShardedIndex, SpreadIndex
from megatron_grit.retrieval.stages.chunk import chunk_rules, cut_documents, is_validation, writing_table
from megatron_grit.retrieval.stages.index import IndexFiles, read_search
from megatron_grit.retrieval.stages.removal import live_blocks, segment_blocks, warn_of_duplicates
from megatron_grit.retrieval.stages.vectors import ChunkVectors
from megatron_grit.retrieval.stages.work import Worker, compute_blocks
from megatron_grit.store.blocks import Arrays, Block, BlockFolder, signature_of
from megatron_grit.store.digest import digest_of_settings
from megatron_grit.store.files import replacing
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
                raise DataError(f"was built of another {what}; build the index again", path=path)
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
            "is of another embedder; set the embedder it was built with, or build the index again",
            path=version_path(project.folder, version.number),
        )
    if worker.is_first:  # what is made of damaged chunks would look like any other
        for segment in version.segments:
            check_stored(project.folder, segment.table, thorough=True)
    worker.barrier()
    return version


def open_index(project: Project, version: Version, worker: Worker | None = None) -> SearchableIndex:
    """The index of a version, ready to search.

    Args:
        project: the database.
        version: of it.
        worker: this process among those that search, which all call this; the index is then placed as the
            configuration says. None: a few searches of this process alone, for which it is mapped.

    Raises:
        ConfigError: it cannot be put on a GPU.
        DataError: a file is missing, damaged or was built again since.
    """
    paths = []
    for segment in version.segments:
        for file in segment.index:
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
    search = search_of(project, version)
    index.set_search(search.nprobe, search.ef_search)
    return index


def stored_vectors(db: VersionedDb, worker: Worker, embedder: Embedder) -> ChunkVectors | None:
    """The vectors that the task embed wrote, of the chunks that the database was built of; None where they are not
    there. All processes call it."""
    project, first = db.project, db.version.segments[0]
    table = TableDb(project, project.folder / first.table.path, db.infos)
    chunks = read_manifest(project.folder / first.index[0].path).chunks
    vectors = ChunkVectors(project, table, embedder, chunks)
    vectors.look(worker)
    return vectors if vectors.stored else None


@dataclasses.dataclass(frozen=True)
class Search:
    """How an index is searched."""

    nprobe: int | None
    ef_search: int | None
    recall: float | None
    """Measured when the index was built. None: it was not measured with these settings, or this query_instruction."""


def search_of(project: Project, version: Version) -> Search:
    """As the configuration says, else as it was chosen when the index was built.

    Raises:
        DataError: the file that says so is missing or cannot be read.
    """
    built = read_search(project.folder / version.search)
    nprobe, ef_search = project.config.nprobe, project.config.ef_search
    same = nprobe in (None, built.nprobe) and ef_search in (None, built.ef_search)
    same &= project.config.query_instruction == built.query_instruction
    return Search(
        built.nprobe if nprobe is None else nprobe,
        built.ef_search if ef_search is None else ef_search,
        built.recall if same else None,
    )


def add_documents(project: Project, worker: Worker, embedder: Embedder) -> None:
    """The task add: chunks of the datasets and of the documents that are new get ids after those that are there, and
    codes in an index file of their own. All processes call it.

    Raises:
        ConfigError: a pinned version; new documents go to the newest.
        DataError: the documents that are there already were changed.
    """
    if project.config.version is not None:
        raise ConfigError(f"version is {project.config.version}; documents are added to the newest: set it to null")
    before = version_to_use(project, worker, embedder)
    addition = Addition(project, before, embedder)
    if not addition.num_documents:
        log.info(f"no documents are new since version {before.number}")
        return
    addition.cut(worker)
    addition.leave_out(worker)
    addition.encode(worker)
    if worker.is_first:
        addition.finish()
    worker.barrier()


def remove_documents(project: Project, worker: Worker, text: str) -> None:
    """The task tombstone: searches of the next version pass over the chunks of some documents. Nothing is deleted, and
    earlier versions find them still. All processes call it.

    Args:
        project: the database.
        worker: this process.
        text: comma list of DATASET:DOCUMENT, or a file with one of them a line. A dataset is its prefix, the last part
            of it, or its number.

    Raises:
        ConfigError: no such dataset or document.
        DataError: no database was built.
    """
    if worker.is_first:
        before = read_version(project.folder)
        asked = np.array(parse_documents(text, [(s.prefix, s.num_documents) for s in before.sources]), dtype=np.int64)
        there = removed_documents(project.folder, before)
        pairs = np.unique(np.concatenate([there, asked]), axis=0)
        if len(pairs) == len(there):
            log.info(f"all of these documents were removed before version {before.number}")
        else:
            number = before.number + 1
            path = version_path(project.folder, number).with_suffix(".tombstones.npy")
            with replacing(path, "wb") as file:
                np.save(file, pairs, allow_pickle=False)
            note = f"removed {len(pairs) - len(there)} documents"
            tombstones = stored_file(project.folder, path)
            changes: dict[str, Any] = {"tombstones": tombstones, "num_tombstones": len(pairs), "notes": [note]}
            after = dataclasses.replace(before, number=number, **changes)
            write_version(project.folder, after)
            log.info(f"version {number} of the database: {note}")
            warn_of_duplicates(project, after, asked)
    worker.barrier()


def parse_documents(text: str, datasets: Sequence[tuple[str, int]], what: str = "tombstone") -> list[tuple[int, int]]:
    """Documents that a command names.

    Args:
        text: as for :func:`remove_documents`.
        datasets: prefix and number of documents of each.
        what: names it in messages.

    Returns:
        (dataset, document) of each.

    Raises:
        ConfigError: no such dataset or document, or none at all.
    """
    names = text.split(",")
    if ":" not in text or os.path.isfile(text):  # which takes a list that is too long for a path
        try:
            names = Path(text).read_text(encoding="utf-8").split("\n")
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{what} {text!r}: neither DATASET:DOCUMENT nor a file that can be read ({error})"
            ) from None
    found = []
    for name in filter(None, (name.strip() for name in names)):
        dataset, _, document = name.rpartition(":")
        numbers = [n for n, (prefix, _) in enumerate(datasets) if dataset in (prefix, str(n), Path(prefix).name)]
        if len(numbers) != 1:
            known = ", ".join(f"{n} = {prefix}" for n, (prefix, _) in enumerate(datasets))
            raise ConfigError(f"{what} {name!r}: {len(numbers)} datasets are called {dataset!r}; there are {known}")
        count = datasets[numbers[0]][1]
        if not is_number(document) or int(document) >= count:
            raise ConfigError(f"{what} {name!r}: {dataset} has documents 0 to {count - 1}")
        found.append((numbers[0], int(document)))
    if not found:
        raise ConfigError(f"{what} {text!r}: names no document; give DATASET:DOCUMENT, or a file of them")
    return found


def is_number(text: str) -> bool:
    """Whether a text is a number of decimal digits, at most 18 of them."""
    return text.isascii() and text.isdecimal() and len(text) <= 18


class Addition:
    """What comes to a version to make the next one.

    Args:
        project: the database.
        before: its newest version.
        embedder: that of its index.
        sources: of the version that it made. None: the files as they are now.

    Raises:
        DataError: documents of the version were changed.
    """

    def __init__(
        self, project: Project, before: Version, embedder: Embedder, sources: list[Source] | None = None
    ) -> None:
        self.project, self.before, self.embedder = project, before, embedder
        self.number = before.number + 1
        self.folder = project.folder / "db" / "versions" / f"{self.number:04d}"
        self.table = self.folder / "train.hdf5"
        self._between = self.folder / "duplicates"
        VersionedDb(project, before)  # its documents are as they were
        paths = project.config.data_paths
        self.sources = sources or [source_of(prefix, project.resolve(prefix)) for prefix in paths]
        old = [source.num_documents for source in before.sources]
        self.first = old + [0] * (len(self.sources) - len(old))
        """First new document of each dataset."""
        for source, earlier in zip(self.sources, before.sources, strict=False):
            path = project.resolve(source.prefix)
            if source.num_documents < earlier.num_documents or not begins_with(path, earlier):
                raise DataError("lacks documents of the database; put the old file back, or tombstone them", path=path)
        settings = {"before": before.chunks, "sources": [dataclasses.asdict(source) for source in self.sources]}
        self.chunks = digest_of_settings(settings)
        parent = (project.folder / before.trained.path).parent
        self.added = parent / f"added_v{self.number:04d}.faissindex"
        self.rules = chunk_rules(project)
        self.folders = [self._chunk_blocks(number) for number in range(len(self.sources))]

    @property
    def num_documents(self) -> int:
        """New documents."""
        return sum(folder.num_items for folder in self.folders)

    def _chunk_blocks(self, number: int) -> BlockFolder:
        signature: dict[str, Any] = {"task": "chunks", "tokens": self.sources[number].fingerprint}
        signature |= {"first": self.first[number], "tokenizer": self.project.tokenizer.fingerprint, **vars(self.rules)}
        name = self.project.chunk_folder(number).name
        count = self.sources[number].num_documents - self.first[number]
        return BlockFolder(self.folder / "individual" / name, count, self.project.config.doc_block_size, signature)

    def recompute_chunks(self) -> Iterator[tuple[str, BlockFolder, Callable[[Block], Arrays]]]:
        """For each dataset of which there are new documents its name, the blocks of their chunks, and what makes one
        again."""
        visible = visible_tokens(self.project.tokenizer)
        for number, folder in enumerate(self.folders):
            file, first = self.project.file(number), self.first[number]

            def compute(block: Block, file: Any = file, first: int = first) -> Arrays:
                return cut_documents(file, first + block.start, first + block.stop, self.rules, visible)

            if folder.num_items:
                yield f"chunks of {self.sources[number].prefix}", folder, compute

    def cut(self, worker: Worker) -> None:
        """Cut the new documents into chunks. All processes call it."""
        for what, folder, compute in self.recompute_chunks():
            compute_blocks(folder, compute, worker, what, "document")

    def leave_out(self, worker: Worker) -> None:
        """Write the table of the new chunks that are in the database neither already nor twice. All processes call it.

        Raises:
            DataError: chunks of the database are missing, without which duplicates are not found.
        """
        config, new = self.project.config, [block for folder in self.folders for block in folder.blocks]
        old = [] if config.duplicates == "keep" else self._earlier_blocks(worker)
        mine = [ChunkBlock(block.path, str(signature_of(block.path))) for block in new]
        search = DuplicateSearch(config, self._between, [*old, *mine], num_old_blocks=len(old))
        search.run(worker)
        if worker.is_first:
            self._merge(search.state()[search.first_new :])
        worker.barrier()

    def _merge(self, state: np.ndarray) -> None:
        num_rows = sum(len(rows) for rows in self._kept_rows(state))
        with writing_table(self.table, num_rows, self.chunks) as table:
            for rows in self._kept_rows(state):
                table.add(rows)
        log.info(f"{num_rows:,} chunks are new; {np.count_nonzero(state):,} stand in the database already")

    def _kept_rows(self, state: np.ndarray) -> Iterator[np.ndarray]:
        """Rows of the table, block by block."""
        config, place = self.project.config, 0
        for number, folder in enumerate(self.folders):
            prefix = self.sources[number].prefix
            for block in folder.blocks:
                rows = folder.read(block, "chunks_valid")["chunks_valid"]
                kept = state[place : place + len(rows)] == 0
                place += len(rows)
                kept &= ~is_validation(prefix, rows[:, 0], config.valid_fraction, config.seed)
                yield np.concatenate([np.full((len(rows), 1), number, np.uint32), rows], axis=1)[kept]

    def _earlier_blocks(self, worker: Worker) -> list[ChunkBlock]:
        """Blocks of the chunks of all segments before, without those that were removed.

        Raises:
            DataError: some are missing.
        """
        blocks = segment_blocks(self.project, self.before)
        found = sum(int(stop) - int(start) for start, _, stop in (block.path.stem.partition("-") for block in blocks))
        wanted = sum(source.num_documents for source in self.before.sources)
        if found < wanted:
            raise DataError(
                f"holds chunks of {found} documents, the database has {wanted}; put the files back, or set duplicates "
                "to keep",
                path=self.project.folder / "db",
            )
        return live_blocks(self.project, self.before, blocks, self._between / "live", worker)

    def recompute_codes(self) -> tuple[BlockFolder, Callable[[Block], Arrays]]:
        """The blocks of the new chunks' codes, and what makes one again.

        Raises:
            DataError: the trained index is missing or of another embedder.
        """
        new = self.new = TableDb(self.project, self.table, infos_of(self.sources))
        trained = VectorIndex.load(
            check_stored(self.project.folder, self.before.trained), embedder=self.before.embedder
        )
        signature: dict[str, Any] = {"task": "add_codes", "chunks": self.chunks, "trained": self.before.trained.sha256}
        signature |= {"embedder": self.before.embedder, "add_load_fraction": self.project.config.add_load_fraction}
        folder = self.added.parent / f"add_codes_v{self.number:04d}"

        def compute(block: Block) -> Arrays:
            count = math.ceil(self.project.config.add_load_fraction * len(block))
            return {"codes": trained.encode(self.embedder.embed(new.texts(range(block.start, block.start + count))))}

        return BlockFolder(folder, len(new), self.project.config.block_size, signature), compute

    def encode(self, worker: Worker) -> None:
        """Embed and encode the new chunks. All processes call it."""
        self.codes, compute = self.recompute_codes()
        compute_blocks(self.codes, compute, worker, "codes")

    def finish(self) -> None:
        """Fill the index of the new chunks, where there are any, and write the version. In one process."""
        index_files = [self._fill()] if len(self.new) else []
        segment = AddedChunks(
            table=stored_file(self.project.folder, self.table), num_chunks=len(self.new), index=index_files
        )
        counts = [source.num_documents - first for source, first in zip(self.sources, self.first, strict=True)]
        added = [f"{n} documents of {s.prefix}" for n, s in zip(counts, self.sources, strict=True) if n]
        note = f"added {', '.join(added)}" + ("" if index_files else ", whose chunks were all there")
        version = dataclasses.replace(
            self.before,
            number=self.number,
            sources=self.sources,
            segments=[*self.before.segments, segment],
            chunks=self.chunks,
            notes=[note],
        )
        shutil.rmtree(self._between, ignore_errors=True)
        write_version(self.project.folder, version)
        if not self.project.config.keep_embeddings:
            self.codes.remove()
        log.info(f"version {version.number} of the database: {version.num_chunks:,} chunks; {version.notes[0]}")

    def _fill(self) -> StoredFile:
        index = VectorIndex.load(check_stored(self.project.folder, self.before.trained))
        base = self.before.num_chunks
        for block in self.codes.blocks:
            codes = self.codes.read(block)["codes"]
            index.add_codes(codes, np.arange(base + block.start, base + block.start + len(codes)))
        trained = read_manifest(self.project.folder / self.before.trained.path)
        manifest = dataclasses.replace(trained, chunks=self.chunks, num_vectors=len(index))
        index.save(self.added, manifest)
        return stored_file(self.project.folder, self.added, manifest.sha256)
