"""The task tombstone: documents that searches pass over from the next version on, and what that leaves of the chunks.

A chunk that was left out as a duplicate goes with the one that stands for it. So duplicates of what comes later are
looked for among the chunks that searches find, and who removes documents is told whose text goes with them.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_grit.config.database.schema import RetroDbConfig
from megatron_grit.data.chunks.chunk_db import ChunkDb, map_dataset
from megatron_grit.data.chunks.project import Project
from megatron_grit.data.chunks.versions import (
    Version,
    VersionedDb,
    document_keys,
    is_among,
    read_version,
    removed_documents,
    sorted_keys,
    stored_file,
    version_numbers,
    version_path,
)
from megatron_grit.data.text.lines import read_lines
from megatron_grit.errors import ConfigError, DataError
from megatron_grit.retrieval.database.cuts import is_validation, keys_in
from megatron_grit.retrieval.database.vectors import find_chunks
from megatron_grit.retrieval.database.versions import next_version
from megatron_grit.retrieval.dedup.duplicates import KnownChunks
from megatron_grit.retrieval.dedup.keys import ChunkBlock, KeyedChunks
from megatron_grit.retrieval.stages.task import MOST_TO_COUNT, Job, Report, Task
from megatron_grit.retrieval.work import Check, Worker
from megatron_grit.store.blocks import signature_of
from megatron_grit.store.files import replacing
from megatron_grit.store.logs import get_logger

log = get_logger(__name__)


class Tombstone(Task):
    """Removes documents from the next version; earlier ones find them still."""

    name = "tombstone"
    needs_embedder = False

    def run(self, job: Job) -> None:
        remove_documents(job.project, job.worker, job.tombstone)

    def validate(self, job: Job) -> Iterator[Check]:
        """As :class:`Task` says: lists of removed documents are compared with their checksums."""
        folder = job.project.folder
        if job.worker.is_first:
            for number in version_numbers(folder):
                removed_documents(folder, read_version(folder, number))
        job.worker.barrier()
        yield from ()

    def describe(self, db: ChunkDb, version: Version | None, *, verify: bool) -> Report:
        """As :class:`Task` says: what was removed. In a large database chunks are not counted: that reads all rows."""
        num_chunks: int | None = 0
        if isinstance(db, VersionedDb) and len(db.tombstones):
            num_chunks = None if len(db) > MOST_TO_COUNT else len(db.chunks_of(db.tombstones))
        return {
            "num_removed_documents": version.num_tombstones if version else 0,
            "num_removed_chunks": num_chunks,
        }


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
            path = version_path(project.folder, before.number + 1).with_suffix(".tombstones.npy")
            with replacing(path, "wb") as file:
                np.save(file, pairs, allow_pickle=False)
            note = f"removed {len(pairs) - len(there)} documents"
            tombstones = stored_file(project.folder, path)
            after = next_version(project.folder, before, note, tombstones=tombstones, num_tombstones=len(pairs))
            log.info(f"version {after.number} of the database: {note}")
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
            names = [line.text() for line in read_lines(text)]
        except DataError as error:
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


@dataclass(frozen=True)
class SegmentBlock:
    """A block of chunks of a segment of a version, those that were left out included."""

    path: Path
    dataset: int
    table: Path
    """Of the segment's chunks."""


def segment_blocks(project: Project, version: Version) -> list[SegmentBlock]:
    """All blocks of chunks of a version that are there, in the order of segments, datasets and documents."""
    # db/merged/train.hdf5, of which db/individual was made, and db/versions/NNNN/train.hdf5 with NNNN/individual.
    tables = [project.folder / segment.table.path for segment in version.segments]
    roots = [tables[0].parent.parent / "individual", *(table.parent / "individual" for table in tables[1:])]
    return [
        SegmentBlock(path, int(path.parent.name.partition("_")[0]), table)
        for root, table in zip(roots, tables, strict=True)
        for path in sorted(root.glob("*/*.hdf5"))
    ]


def is_in_table(block: SegmentBlock, rows: np.ndarray) -> np.ndarray:
    """Which rows of a block, uint32 [n, 4], its table holds: bool [n]."""
    if not len(rows):
        return np.zeros(0, dtype=bool)
    return find_chunks(map_dataset(block.table, "chunks"), block.dataset, rows[:, 0], rows[:, 1]) >= 0


def keys_of(block: SegmentBlock, rows: np.ndarray) -> np.ndarray:
    """Keys of the documents of rows of a block."""
    return document_keys(np.full(len(rows), block.dataset), rows[:, 0])


def earlier_chunks(project: Project, version: Version) -> list[KnownChunks]:
    """The chunks of each segment of a version, for whoever adds others: without removed documents all of them, else
    those that searches still find, and those of documents that are kept for validation.

    Raises:
        DataError: a block is missing or damaged, without which duplicates are not found.
    """
    blocks = segment_blocks(project, version)
    found = sum(int(stop) - int(start) for start, _, stop in (block.path.stem.partition("-") for block in blocks))
    wanted = sum(source.num_documents for source in version.sources)
    if found < wanted:
        raise DataError(
            f"holds chunks of {found} documents, the database has {wanted}; put the files back, or set duplicates "
            "to keep",
            path=project.folder / "db",
        )
    # Blocks that lie together were made by one run, so one of them tells what all follow from.
    signatures = {block.path.parent: str(signature_of(block.path)) for block in reversed(blocks)}
    removed = sorted_keys(removed_documents(project.folder, version))
    found_segments = []
    for table in dict.fromkeys(block.table for block in blocks):
        own = [block for block in blocks if block.table == table]
        named = [ChunkBlock(block.path, f"{signatures[block.path.parent]} {block.path.name}") for block in own]
        chunks = KeyedChunks(project.config, keys_in(own[0].path.parent.parent.parent), named)
        is_live = functools.partial(_is_live, project, version, own, chunks, removed)
        found_segments.append(KnownChunks(chunks, None if version.tombstones is None else is_live))
    return found_segments


def _is_live(
    project: Project,
    version: Version,
    blocks: list[SegmentBlock],
    keyed: KeyedChunks,
    removed: np.ndarray,
    chunks: np.ndarray,
) -> np.ndarray:
    """Which chunks of a segment, int64 [n], a new one may be a duplicate of: bool [n]."""
    order = np.argsort(chunks, kind="stable")
    rows, of = keyed.gather("chunks_valid", chunks[order]), np.searchsorted(keyed.ends, chunks[order], side="right")
    datasets = np.array([block.dataset for block in blocks])[of]
    keep = np.zeros(len(chunks), dtype=bool)
    config: RetroDbConfig = project.config
    for dataset in np.unique(datasets).tolist():
        own = datasets == dataset
        block, prefix = blocks[of[own][0]], version.sources[dataset].prefix
        live = is_in_table(block, rows[own])
        live |= is_validation(prefix, rows[own][:, 0], config.valid_fraction, config.seed)
        keep[order[own]] = live & ~is_among(keys_of(block, rows[own]), removed)
    return keep


def warn_of_duplicates(project: Project, version: Version, newly_removed: np.ndarray) -> None:
    """Say how many chunks of other documents go with those that were removed. Reads the hashes of all chunks.

    Args:
        project: the database.
        version: without the documents.
        newly_removed: int64 [n, 2], dataset and document of each.
    """
    if project.config.duplicates == "keep":
        return
    try:
        gone = list(_left_out_with(project, version, sorted_keys(newly_removed)))
    except DataError as error:
        log.warning(f"not known whether chunks of other documents equal removed ones: {error}")
        return
    if gone:
        documents = {(dataset, document) for dataset, document in gone}
        dataset, document = min(documents)
        log.warning(
            f"chunks that equal those of removed documents were left out as duplicates, and are not found any more "
            f"either: {len(gone):,}, of other documents: {len(documents):,} (as {version.sources[dataset].prefix}, "
            f"document {document}). To have their texts found, write these documents to an indexed file and add it"
        )


def _left_out_with(project: Project, version: Version, newly: np.ndarray) -> Iterator[tuple[int, int]]:
    """Dataset and document of each chunk that was left out because it equals a chunk of some documents."""
    removed = sorted_keys(removed_documents(project.folder, version))
    blocks, hashes = segment_blocks(project, version), [np.empty((0, 2), dtype=np.uint64)]
    for block in blocks:
        rows = map_dataset(block.path, "chunks_valid")
        own = np.flatnonzero(is_among(keys_of(block, rows), newly))
        own = own[is_in_table(block, rows[own])]
        hashes.append(map_dataset(block.path, "hashes")[own])
    of_removed = np.concatenate(hashes)
    pairs, firsts = set(map(tuple, of_removed.tolist())), np.unique(of_removed[:, 0])
    for block in blocks if pairs else []:
        found = map_dataset(block.path, "hashes")
        places = np.flatnonzero(is_among(found[:, 0], firsts))
        rows = map_dataset(block.path, "chunks_valid")[places]
        left_out = ~is_in_table(block, rows) & ~is_among(keys_of(block, rows), removed)
        prefix, config = version.sources[block.dataset].prefix, project.config
        left_out &= ~is_validation(prefix, rows[:, 0], config.valid_fraction, config.seed)
        for place, row in zip(places[left_out].tolist(), rows[left_out].tolist(), strict=True):
            if tuple(found[place].tolist()) in pairs:
                yield block.dataset, row[0]
