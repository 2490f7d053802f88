"""Documents of a database cut into chunks: all of them for a first build, those that come for an addition."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_grit.compat import needed
from megatron_grit.data.chunks.chunking import ChunkRules, chunk_documents, visible_tokens
from megatron_grit.data.chunks.project import DatasetInfo, Project
from megatron_grit.data.indexed.reader import IndexedFile
from megatron_grit.retrieval.dedup.buckets import mix64
from megatron_grit.retrieval.dedup.duplicates import DuplicateSearch, KnownChunks
from megatron_grit.retrieval.dedup.keys import ChunkBlock
from megatron_grit.retrieval.work import Check, Worker, compute_blocks
from megatron_grit.store.blocks import Arrays, Block, BlockFolder, cannot_write, set_text
from megatron_grit.store.files import replacing_path

_BETWEEN = "duplicates"
_MARGIN = 1 << 20
"""Bytes of a table file that are not rows, generously."""


@dataclass(frozen=True)
class Cut:
    """The documents of a dataset that are cut into chunks: all of them, or those that come to a database."""

    number: int
    """Of the dataset."""
    dataset: DatasetInfo
    first: int
    """The first of the documents."""
    blocks: BlockFolder
    """Their chunks; item i is document ``first + i``."""


def cuts_of(
    project: Project, datasets: Sequence[DatasetInfo], added_to: Sequence[int] = (), folder: Path | None = None
) -> list[Cut]:
    """What is cut of each dataset.

    Args:
        project: the database.
        datasets: of a first build, or of the version that an addition makes.
        added_to: documents of each dataset that the database has already, for an addition.
        folder: of the addition. None: a first build.
    """
    cuts = []
    for number, dataset in enumerate(datasets):
        first = added_to[number] if number < len(added_to) else 0
        name = project.chunk_folder(number).name
        signature = {
            "task": "chunks",
            "tokens": dataset.fingerprint,
            "tokenizer": project.tokenizer.fingerprint,
            **vars(chunk_rules(project)),
            **({} if folder is None else {"first": first}),
        }
        root = (folder or project.folder / "db") / "individual"
        remedy = "run --tasks db-build" if folder is None else "run --tasks add"
        blocks = BlockFolder(root / name, dataset.n_docs - first, project.config.doc_block_size, signature, remedy)
        cuts.append(Cut(number, dataset, first, blocks))
    return cuts


def chunk_blocks(project: Project, cuts: Sequence[Cut]) -> Iterator[Check]:
    """The blocks of chunks of each dataset that has documents to cut, and what makes one."""
    visible, rules = visible_tokens(project.tokenizer), chunk_rules(project)
    for cut in cuts:

        def compute(block: Block, cut: Cut = cut) -> Arrays:
            first, last = cut.first + block.start, cut.first + block.stop
            return cut_documents(project.file(cut.number), first, last, rules, visible)

        if cut.blocks.num_items:
            yield Check(f"chunks of {cut.dataset.prefix}", cut.blocks, compute)


def cut_chunks(project: Project, cuts: Sequence[Cut], worker: Worker) -> None:
    """Write the chunks of all datasets. All processes call it."""
    for what, blocks, compute, _ in chunk_blocks(project, cuts):
        compute_blocks(blocks, compute, worker, what, "document")


def find_duplicates(
    project: Project, cuts: Sequence[Cut], folder: Path, worker: Worker, earlier: Sequence[KnownChunks] = ()
) -> DuplicateSearch:
    """Find chunks that repeat one before them. All processes call it.

    Args:
        project: the database.
        cuts: documents whose chunks are there.
        folder: of their table and blocks. What is computed on the way is in ``duplicates``, see
            :func:`clear_duplicates`; ``keys`` stay.
        worker: this process.
        earlier: chunks that the database has already.
    """
    blocks = [block for _, block in blocks_of(cuts)]
    search = DuplicateSearch(project.config, folder / _BETWEEN, keys_in(folder), blocks, earlier)
    search.run(worker)
    return search


def keys_in(folder: Path) -> Path:
    """Where the keys of the chunks of a first build, or of an addition, are kept."""
    return folder / "keys"


def clear_duplicates(folder: Path) -> None:
    """Remove what the search for duplicates has computed on the way. In one process."""
    shutil.rmtree(folder / _BETWEEN, ignore_errors=True)


def blocks_of(cuts: Sequence[Cut]) -> list[tuple[int, ChunkBlock]]:
    """Blocks of chunks in their order, each with the number of its dataset."""
    return [
        (cut.number, ChunkBlock(block.path, f"{cut.blocks.signature} {block.path.name}"))
        for cut in cuts
        for block in cut.blocks.blocks
    ]


def cut_documents(file: IndexedFile, first: int, last: int, rules: ChunkRules, visible: np.ndarray) -> Arrays:
    """:func:`~megatron_grit.data.chunks.chunking.chunk_documents`.

    Raises:
        ConfigError: near duplicates are wanted and datasketch is not installed.
        DataError: as said there.
    """
    with needed("duplicates near needs", "datasketch", "retro"):
        return chunk_documents(file, first, last, rules, visible)


def chunk_rules(project: Project) -> ChunkRules:
    """How the documents of a project are cut."""
    config = project.config
    return ChunkRules(
        chunk_length=config.chunk_length,
        min_tokens=config.min_chunk_tokens,
        eod_id=project.tokenizer.eos_id,
        minhash=config.minhash_permutations if config.duplicates == "near" else 0,
    )


def is_validation(prefix: str, documents: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Whether documents are kept out of the database for validation, by a hash of dataset, number and seed, so that
    documents which are added later change nothing.

    Args:
        prefix: of the dataset.
        documents: int [n], their numbers.
        fraction: share that is.
        seed: another one gives other documents.

    Returns:
        bool [n].
    """
    salt = int.from_bytes(hashlib.sha256(f"{seed} {Path(prefix).name}".encode()).digest()[:8], "little")
    return mix64(documents.astype(np.uint64) ^ np.uint64(salt)).astype(np.float64) / 2.0**64 < fraction


@dataclass(kw_only=True)
class Part:
    """The chunks of a block, parted."""

    dataset: int
    """Its number."""
    invalid: np.ndarray
    state: np.ndarray
    """uint8 [valid chunks]: 0, EQUAL or SIMILAR."""
    held_out: np.ndarray
    """bool [documents]: kept for validation."""
    train: np.ndarray
    valid: np.ndarray
    doc_offsets: np.ndarray = field(default_factory=lambda: np.empty((0, 3), np.uint64))


def parted(project: Project, cuts: Sequence[Cut], states: np.ndarray) -> Iterator[Part]:
    """The chunks of all blocks, in their order, parted.

    Args:
        project: the database.
        cuts: what was cut of each dataset.
        states: uint8, of each chunk, as of :meth:`DuplicateSearch.state`.
    """
    config, place, num_train = project.config, 0, 0
    for cut in cuts:
        for block in cut.blocks.blocks:
            arrays, first = cut.blocks.read(block, "chunks_valid", "chunks_invalid"), cut.first + block.start
            rows = arrays["chunks_valid"]
            state = states[place : place + len(rows)]
            place += len(rows)
            documents = np.arange(first, first + len(block))
            held_out = is_validation(cut.dataset.prefix, documents, config.valid_fraction, config.seed)
            in_valid = held_out[rows[:, 0].astype(np.int64) - first]
            named = np.concatenate([np.full((len(rows), 1), cut.number, np.uint32), rows], axis=1)
            train, valid = named[(state == 0) & ~in_valid], named[(state == 0) & in_valid]
            per_document = np.bincount(train[:, 1].astype(np.int64) - first, minlength=len(block))
            columns = [np.full(len(block), cut.number), documents, num_train + np.cumsum(per_document)]
            offsets = np.stack(columns, axis=1).astype(np.uint64)[~held_out]
            num_train += len(train)
            yield Part(
                dataset=cut.number,
                invalid=arrays["chunks_invalid"],
                state=state,
                held_out=held_out,
                train=train,
                valid=valid,
                doc_offsets=offsets,
            )


class _Tables:
    def __init__(self, rows: Any, offsets: Any) -> None:
        self._rows, self._offsets, self._row, self._offset = rows, offsets, 0, 0
        self.digest = hashlib.sha256()

    def add(self, rows: np.ndarray, offsets: np.ndarray | None = None) -> None:
        self._rows[self._row : self._row + len(rows)] = rows
        self._row += len(rows)
        self.digest.update(np.ascontiguousarray(rows, dtype="<u4").tobytes())
        if offsets is not None:
            self._offsets[self._offset : self._offset + len(offsets)] = offsets
            self._offset += len(offsets)


@contextmanager
def writing_table(path: Path, num_rows: int, signature: str, num_documents: int | None = None) -> Iterator[_Tables]:
    """A merged table to fill in order: ``chunks``, uint32 [rows, 5], and ``doc_offsets``, uint64 [documents, 3].

    Raises:
        DataError: the disk is full.
    """
    import h5py

    path.parent.mkdir(parents=True, exist_ok=True)
    num_bytes, free = 20 * num_rows + 24 * (num_documents or 0), shutil.disk_usage(path.parent).free
    # Asked before: where a disk fills up under HDF5 the process crashes.
    if num_bytes + _MARGIN > free:
        raise cannot_write(path, f"it takes {num_bytes + _MARGIN:,} bytes, {free:,} are free")
    with replacing_path(path) as temporary, h5py.File(temporary, "w") as file:
        set_text(file, "signature", signature)
        rows = file.create_dataset("chunks", (num_rows, 5), dtype="u4")
        file.create_dataset("n_written", data=np.array([num_rows], dtype=np.uint64))
        offsets = None
        if num_documents is not None:
            offsets = file.create_dataset("doc_offsets", (num_documents, 3), dtype="u8")
        tables = _Tables(rows, offsets)
        yield tables
        set_text(file, "rows_sha256", tables.digest.hexdigest())
