"""What the removal of documents leaves of the chunks that a database was cut from.

A chunk that was left out as a duplicate goes with the one that stands for it. So duplicates of what comes later are
looked for among the chunks that searches find, and who removes documents is told whose text goes with them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_grit.config.database.schema import RetroDbConfig
from megatron_grit.data.chunks.chunk_db import map_dataset
from megatron_grit.data.chunks.project import Project
from megatron_grit.data.chunks.versions import Version, document_keys, is_among, removed_documents, sorted_keys
from megatron_grit.errors import DataError
from megatron_grit.retrieval.dedup.duplicates import ChunkBlock
from megatron_grit.retrieval.stages.chunk import is_validation
from megatron_grit.retrieval.stages.vectors import find_chunks
from megatron_grit.retrieval.stages.work import Worker, compute_blocks
from megatron_grit.store.blocks import Arrays, Block, BlockFolder, read_arrays, signature_of
from megatron_grit.store.logs import get_logger

log = get_logger(__name__)


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


def live_blocks(
    project: Project, version: Version, blocks: list[SegmentBlock], folder: Path, worker: Worker
) -> list[ChunkBlock]:
    """Blocks with the chunks that a new one may be a duplicate of. All processes call it.

    Without removed documents these are all of them. Else they are copies in ``folder`` that hold the chunks which
    searches still find, and those of documents that are kept for validation.

    Raises:
        DataError: a block or a table is missing or damaged.
    """
    if version.tombstones is None:
        return [ChunkBlock(block.path, str(signature_of(block.path))) for block in blocks]
    removed = sorted_keys(removed_documents(project.folder, version))
    config: RetroDbConfig = project.config
    signature = {"task": "live_chunks", "chunks": version.chunks, "tombstones": version.tombstones.sha256}
    copies = BlockFolder(
        folder, len(blocks), 1, signature | {"blocks": [str(signature_of(block.path)) for block in blocks]}
    )

    def compute(part: Block) -> Arrays:
        block = blocks[part.start]
        arrays = read_arrays(block.path)
        rows, prefix = arrays["chunks_valid"], version.sources[block.dataset].prefix
        keep = is_in_table(block, rows) | is_validation(prefix, rows[:, 0], config.valid_fraction, config.seed)
        keep &= ~is_among(keys_of(block, rows), removed)
        return {name: arrays[name][keep] for name in ("hashes", "minhashes") if name in arrays}

    compute_blocks(copies, compute, worker, "chunks that are not removed", "block")
    return [ChunkBlock(part.path, f"{copies.signature} {part.path.name}") for part in copies.blocks]


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
