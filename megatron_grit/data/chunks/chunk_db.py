"""The chunks of a retrieval database, to read: a table that is mapped, and the tokens and texts behind it.

Chunk ids are rows of ``db/merged/train.hdf5``, 64 bits wide. Nothing is loaded at the start, whatever the size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_grit.data.chunks.chunking import document_tokens, padded, read_runs
from megatron_grit.data.chunks.project import DatasetInfo, Project
from megatron_grit.errors import DataError
from megatron_grit.store.blocks import DAMAGED, check_arrays, text_of
from megatron_grit.store.content import content_part
from megatron_grit.store.digest import digest_of_rows

_COLUMNS = 5
DATASET, DOCUMENT, START, STOP, VISIBLE = range(_COLUMNS)
"""Columns of the table."""


def map_dataset(path: Path, name: str, remedy: str = "run --tasks db-build", *, compare: bool = True) -> np.ndarray:
    """An array of an HDF5 file, by mmap.

    Args:
        path: the file.
        name: of the array.
        remedy: what to run when it is not there, for errors.
        compare: with the checksum that the file holds; False where that was done.

    Raises:
        DataError: the file is missing or damaged, or the array is not stored in one piece.
    """
    import h5py

    if not path.is_file():
        raise DataError(f"is missing; {remedy}", path=path)
    try:
        with h5py.File(path, "r") as file:
            dataset = file[name]
            offset, shape, dtype = dataset.id.get_offset(), dataset.shape, dataset.dtype
            of_arrays, of_rows = "sha256" in file.attrs, text_of(file, "rows_sha256", "")
    except DAMAGED as error:
        raise DataError(f"cannot be read ({error}); delete it and {remedy}", path=path) from None
    # Of a table the rows alone have a checksum, which does not tell a header that says another type.
    is_table = bool(of_rows) and name == "chunks"
    if is_table and (dtype != np.uint32 or shape[1:] != (_COLUMNS,)):
        raise DataError(f"holds {dtype} {shape} and not uint32 [chunks, {_COLUMNS}]; delete it and {remedy}", path=path)
    if 0 in shape:
        mapped = np.empty(shape, dtype)
    elif offset is None or path.stat().st_size < offset + dtype.itemsize * math.prod(shape):
        raise DataError(f"does not hold {name} in one piece; delete it and {remedy}", path=path)
    else:
        mapped = np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=shape)
    if compare and of_arrays:
        check_arrays(path)
    if compare and is_table and content_part(path, "rows", lambda: digest_of_rows(mapped)) != of_rows:
        raise DataError(f"does not match its checksum; delete it and {remedy}", path=path)
    return mapped


class ChunkDb:
    """Chunks of a database.

    Args:
        project: where it is.
        part: "train", the database itself, or "valid".
        infos: its datasets, where their files were looked at already. None: those that were built, which must be
            unchanged.

    Attributes:
        rows: uint32 [num_chunks, 5]: dataset, document, first token and one after the last in the document, and tokens
            that are not blank; mapped.

    Raises:
        DataError: it was not built, its files have changed, or its table is of another build.
    """

    def __init__(self, project: Project, part: str = "train", infos: list[DatasetInfo] | None = None) -> None:
        self.project = project
        self.infos = project.infos() if infos is None else infos
        self.path = project.merged / f"{part}.hdf5"
        self.rows = map_dataset(self.path, "chunks")
        attribute = "n_chunks_train" if part == "train" else None
        expected = sum(info.n_chunks_train if attribute else info.n_chunks - info.n_chunks_train for info in self.infos)
        if len(self.rows) != expected:
            raise DataError(
                f"holds {len(self.rows)} chunks, {project.infos_path.name} says {expected}; run --tasks db-build",
                path=self.path,
            )

    def __len__(self) -> int:
        return len(self.rows)

    def tokens(self, chunk: int, *, num_tokens: int | None = None) -> np.ndarray:
        """Tokens of a chunk, in the file's own type.

        Args:
            chunk: its id.
            num_tokens: read so many from its start instead, into what follows it in its document; fewer at the end.

        Raises:
            IndexError: no such chunk.
        """
        if not 0 <= chunk < len(self.rows):
            raise IndexError(f"chunk {chunk} of {len(self.rows)}")
        dataset, document, start, stop, _ = (int(value) for value in self.rows[chunk])
        file = self.project.file(dataset)
        if num_tokens is None:
            return file.read(*file.sequences(document), start, stop - start)
        return document_tokens(file, document, start, num_tokens, self.project.tokenizer.eos_id)

    def read_tokens(
        self, chunks: np.ndarray, length: int | None = None, pad_id: int = 0
    ) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of many chunks with what follows each in its document: neighbors with their continuations.

        Args:
            chunks: ids of any shape; negative for none.
            length: tokens of each. None: two chunks.
            pad_id: stands where a document has ended, and for an id that is none.

        Returns:
            int32 [*chunks.shape, length], and bool of that shape: where a token is. As :meth:`tokens` a document's
            closing end-of-document token is none.

        Raises:
            IndexError: no such chunk.
            DataError: a damaged file.
        """
        length = 2 * self.project.config.chunk_length if length is None else length
        ids = np.asarray(chunks, dtype=np.int64)
        if ids.size and ids.max() >= len(self.rows):
            raise IndexError(f"chunk {ids.max()} of {len(self.rows)}")
        return read_places(self.project, sources_of(self.rows, ids, 4), ids >= 0, length, pad_id)

    def texts(self, chunks: Sequence[int] | np.ndarray) -> list[str]:
        """Texts of chunks."""
        decode = self.project.tokenizer.decode
        return [decode(self.tokens(int(chunk)).tolist()) for chunk in chunks]

    def describe(self, chunk: int) -> str:
        """ "corpus#12:64-128": dataset, document and tokens."""
        dataset, document, start, stop, _ = self.rows[chunk].tolist()
        return f"{Path(self.infos[dataset].prefix).name}#{document}:{start}-{stop}"


def sources_of(rows: np.ndarray, ids: np.ndarray, columns: int = 3) -> np.ndarray:
    """Dataset, document and first token of chunks: uint32 [*ids.shape, 3], zeros where an id is negative.

    Args:
        rows: of a database, as :attr:`ChunkDb.rows`.
        ids: of any shape.
        columns: of the rows; 4 with the token after the last.
    """
    out = np.zeros((*ids.shape, columns), dtype=np.uint32)
    there = ids >= 0
    out[there] = rows[ids[there]][:, :columns]
    return out


def read_places(
    project: Project, sources: np.ndarray, there: np.ndarray, length: int, pad_id: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens from places of documents on, as :meth:`ChunkDb.read_tokens` and without the table of chunks: what the
    neighbors of :meth:`~megatron_grit.data.chunks.neighbor_table.NeighborTable.read_sources` are.

    Args:
        project: whose documents they are.
        sources: uint32 [..., 3], dataset, document and first token of each; with the token after the last of a chunk in
            a fourth column, this is checked as well.
        there: bool [...], where something is to be read.
        length: tokens of each.
        pad_id: stands where a document has ended, and where nothing is read.

    Returns:
        int32 [..., length], and bool of that shape: where a token is.

    Raises:
        DataError: a place beyond the end of its document; a damaged file.
    """
    places, wanted = sources.reshape(-1, sources.shape[-1]), there.reshape(-1)
    counts = np.zeros(len(places), dtype=np.int64)
    tokens, counts[wanted] = read_texts(project, places[wanted], length)
    shape = (*there.shape, length)
    rows = padded(tokens.astype(np.int32), counts, length, pad_id)
    return rows.reshape(shape), (np.arange(length) < counts[:, None]).reshape(shape)


def read_texts(project: Project, sources: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """As :func:`read_places`, one text after another.

    Args:
        project: whose documents they are.
        sources: as there, [n, 3 or 4].
        length: most tokens of each.

    Returns:
        Tokens of all, [sum of counts], and how many there are of each, int64 [n].

    Raises:
        DataError: as there.
    """
    datasets = set(sources[:, DATASET].tolist())
    if len(datasets) == 1:
        return _texts_of(project, datasets.pop(), sources, length)
    counts, parts = np.zeros(len(sources), dtype=np.int64), []
    for dataset in datasets:
        here = sources[:, DATASET] == dataset
        tokens, counts[here] = _texts_of(project, dataset, sources[here], length)
        parts.append((here, tokens))
    merged = np.empty(counts.sum(), dtype=np.result_type(np.int32, *(tokens for _, tokens in parts)))
    for here, tokens in parts:
        merged[np.repeat(here, counts)] = tokens
    return merged, counts


def _texts_of(project: Project, dataset: int, sources: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    file, starts = project.file(dataset), sources[:, START].astype(np.int64)
    begins, lengths = file.extents(sources[:, DOCUMENT])
    stops = np.maximum(sources[:, STOP], starts + 1) if sources.shape[1] > STOP else starts + 1
    if (stops > lengths).any():
        raise DataError(
            "chunks go beyond their documents' ends; run --tasks db-build, or query-neighbors if a table of "
            "neighbors was read",
            path=file.bin_path,
        )
    return read_runs(file, begins, lengths, starts, length, project.tokenizer.eos_id)
