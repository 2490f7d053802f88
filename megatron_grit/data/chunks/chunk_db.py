"""The chunks of a retrieval database, to read: a table that is mapped, and the tokens and texts behind it.

Chunk ids are rows of ``db/merged/train.hdf5``, 64 bits wide. Nothing is loaded at the start, whatever the size.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_grit.data.chunks.chunking import document_tokens
from megatron_grit.data.chunks.project import DatasetInfo, Project
from megatron_grit.errors import DataError

DATASET, DOCUMENT, START, STOP, VISIBLE = range(5)
"""Columns of the table."""


def map_dataset(path: Path, name: str, remedy: str = "run --tasks db-build") -> np.ndarray:
    """An array of an HDF5 file, by mmap.

    Args:
        path: the file.
        name: of the array.
        remedy: what to run when it is not there, for errors.

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
            if dataset.size == 0:
                return np.empty(shape, dtype)
    except (OSError, KeyError, RuntimeError) as error:
        raise DataError(f"cannot be read ({error}); delete it and {remedy}", path=path) from None
    if offset is None or path.stat().st_size < offset + dtype.itemsize * int(np.prod(shape)):
        raise DataError(f"does not hold {name} in one piece; delete it and {remedy}", path=path)
    return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=shape)


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
        ids = np.asarray(chunks, dtype=np.int64).reshape(-1)
        there = np.flatnonzero(ids >= 0)
        if len(there) and ids.max() >= len(self.rows):
            raise IndexError(f"chunk {ids.max()} of {len(self.rows)}")
        rows, eod_id = self.rows[ids[there]], self.project.tokenizer.eos_id
        tokens = np.full((len(ids), length), pad_id, dtype=np.int32)
        counts = np.zeros(len(ids), dtype=np.int64)
        for dataset in np.unique(rows[:, DATASET]).tolist():
            here = np.flatnonzero(rows[:, DATASET] == dataset)
            file, starts = self.project.file(dataset), rows[here, START].astype(np.int64)
            begins, lengths = file.extents(rows[here, DOCUMENT])
            if (starts + (rows[here, STOP] - rows[here, START]) > lengths).any():
                raise DataError("holds chunks beyond their documents' ends; run --tasks db-build", path=self.path)
            count = np.minimum(lengths - starts, length)
            read = np.zeros((len(here), length), dtype=file.dtype)
            file.read_into(read, begins + starts * file.dtype.itemsize, count)
            last = np.flatnonzero((starts + count == lengths) & (count > 0))
            count[last] -= read[last, count[last] - 1] == eod_id
            mask = np.arange(length) < count[:, None]
            tokens[there[here]] = np.where(mask, read, pad_id)
            counts[there[here]] = count
        shape = (*np.shape(chunks), length)
        return tokens.reshape(shape), (np.arange(length) < counts[:, None]).reshape(shape)

    def texts(self, chunks: Sequence[int] | np.ndarray) -> list[str]:
        """Texts of chunks."""
        decode = self.project.tokenizer.decode
        return [decode(self.tokens(int(chunk)).tolist()) for chunk in chunks]

    def describe(self, chunk: int) -> str:
        """ "corpus#12:64-128": dataset, document and tokens."""
        dataset, document, start, stop, _ = self.rows[chunk].tolist()
        return f"{Path(self.infos[dataset].prefix).name}#{document}:{start}-{stop}"
