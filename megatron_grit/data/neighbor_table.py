"""Neighbors of chunks, to train with: found by (dataset, document, offset), whatever the seed, batch or sequence.

A table holds ``num_neighbors_save`` chunk ids for every place of every document at which a chunk begins, nearest
first, -1 where there are fewer. It is mapped, so nothing is loaded and no file is opened for each chunk. It belongs to
one state of the database: chunks that are added later change nothing for who reads it.

Neighbors from a chunk's own document are left out when the table is made. A training sample may hold several documents;
:meth:`NeighborTable.read` leaves out those of all of them (Retro, arXiv 2112.04426, section 2.1, leaves out the chunk's
own document; Megatron's tools those of the sample).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from megatron_grit.data.retro_project import fingerprint
from megatron_grit.errors import DataError
from megatron_grit.files import replacing_path, write_json

NONE = -1


@dataclass(kw_only=True)
class TableManifest:
    """``table.json``."""

    prefix: str
    tokens: str
    """Fingerprint of the documents that the neighbors are for."""
    chunk_length: int
    num_neighbors: int
    num_documents: int
    num_places: int
    database: str
    """Fingerprint of the chunks that the ids are of."""
    embedder: str
    index_sha256: list[str]
    nprobe: int | None
    ef_search: int | None
    recall: float


class NeighborTable:
    """Neighbors of one indexed file's chunks.

    Args:
        folder: where :func:`write_table` wrote it.
        documents_of: uint32 [num_chunks, 2 or more], whose first columns are dataset and document of each chunk of the
            database: its mapped table.

    Raises:
        DataError: it is missing, damaged, or of another version of the file.
    """

    def __init__(self, folder: Path, documents_of: np.ndarray) -> None:
        self.folder, self._documents_of = folder, documents_of
        path = folder / "table.json"
        try:
            self.manifest = TableManifest(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise DataError(f"cannot be read ({error}); run the task query-neighbors", path=path) from None
        shape = (self.manifest.num_places, self.manifest.num_neighbors)
        self._neighbors = _mapped(folder / "neighbors.npy", shape)
        self._starts = _mapped(folder / "starts.npy", (self.manifest.num_documents + 1,))

    def check_source(self, prefix: Path) -> None:
        """Compare the file that is trained on with the one that was queried.

        Raises:
            DataError: they differ.
        """
        if fingerprint(prefix) != self.manifest.tokens:
            raise DataError("has changed since its neighbors were searched; run query-neighbors again", path=prefix)

    def place(self, document: int, offset: int) -> int:
        """Row of the chunk of a document that begins at a token.

        Raises:
            IndexError: no chunk begins there.
        """
        chunk, rest = divmod(offset, self.manifest.chunk_length)
        start, stop = (int(value) for value in self._starts[document : document + 2])
        if rest or not 0 <= chunk < stop - start:
            raise IndexError(f"document {document} has no chunk at token {offset}")
        return start + chunk

    def read(
        self, chunks: Sequence[tuple[int, int]], sample_documents: Sequence[tuple[int, int]], k: int
    ) -> np.ndarray:
        """The nearest neighbors of chunks that are in no document of their sample.

        Args:
            chunks: (document, first token) of each.
            sample_documents: (dataset, document) of every document of the sample, as the database numbers them.
            k: neighbors of a chunk.

        Returns:
            int64 [len(chunks), k]: chunk ids, nearest first; -1 where there are fewer.
        """
        rows = np.array(self._neighbors[[self.place(*chunk) for chunk in chunks]])
        return first_allowed(rows, self._documents_of, sample_documents, k)


def first_allowed(
    ids_QK: np.ndarray, documents_of: np.ndarray, excluded: Sequence[tuple[int, int]], k: int
) -> np.ndarray:
    """The first ``k`` ids of each row whose (dataset, document) is not excluded; -1 where there are fewer."""
    keep = ids_QK >= 0
    found = documents_of[np.where(keep, ids_QK, 0)]
    for dataset, document in set(excluded):
        keep &= (found[..., 0] != dataset) | (found[..., 1] != document)
    return take_first(ids_QK, keep, k)


def take_first(ids_QK: np.ndarray, keep_QK: np.ndarray, k: int) -> np.ndarray:
    """The first ``k`` kept entries of each row, in their order; -1 where there are fewer."""
    order = np.argsort(~keep_QK, axis=1, kind="stable")[:, :k]
    taken = np.where(np.take_along_axis(keep_QK, order, 1), np.take_along_axis(ids_QK, order, 1), NONE)
    return np.pad(taken, ((0, 0), (0, k - taken.shape[1])), constant_values=NONE).astype(np.int64)


def write_table(folder: Path, starts: np.ndarray, parts: Sequence[np.ndarray], manifest: TableManifest) -> None:
    """Write a table; it is there when its manifest is.

    Args:
        folder: made where it is not there.
        starts: int64 [documents + 1], places before each document.
        parts: int64 [places, neighbors] in runs, in order.
        manifest: what it is of.
    """
    shape = (manifest.num_places, manifest.num_neighbors)
    with replacing_path(folder / "starts.npy") as path, path.open("wb") as file:
        np.save(file, starts.astype(np.int64), allow_pickle=False)
    with replacing_path(folder / "neighbors.npy") as path, path.open("wb") as file:
        np.lib.format.write_array_header_2_0(file, {"descr": "<i8", "fortran_order": False, "shape": shape})
        for part in parts:
            file.write(np.ascontiguousarray(part, dtype="<i8").tobytes())
    write_json(folder / "table.json", asdict(manifest))


def _mapped(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(f"cannot be read ({error}); run the task query-neighbors again", path=path) from None
    if array.shape != shape or array.dtype != np.int64:
        raise DataError(
            f"holds {array.dtype} {array.shape} and not int64 {shape}; run the task query-neighbors again", path=path
        )
    return array
