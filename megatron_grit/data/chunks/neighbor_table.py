"""Neighbors of chunks, to train with: found by (dataset, document, offset), whatever the seed, batch or sequence.

A table holds ``num_neighbors_save`` chunk ids for every chunk position of every document, nearest
first, -1 where there are fewer; beside them their scores, and their documents and first tokens, so that a reader needs
neither the index nor the table of chunks. It is mapped, so nothing is loaded and no file is opened for each chunk. It
belongs to one version of the database: what is added or removed later changes nothing for who reads it.

Neighbors from a chunk's own document are left out when the table is made. A training sample may hold several documents;
:meth:`NeighborTable.read` leaves out those of all of them (Retro, arXiv 2112.04426, section 2.1, leaves out the chunk's
own document; Megatron's tools those of the sample).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from megatron_grit.data.chunks.chunk_db import sources_of
from megatron_grit.data.chunks.chunking import document_tokens
from megatron_grit.data.chunks.sample_documents import SampleDocuments
from megatron_grit.data.chunks.versions import Source, begins_with, document_keys
from megatron_grit.data.indexed.reader import IndexedFile
from megatron_grit.errors import DataError
from megatron_grit.store.content import content_part, thoroughly
from megatron_grit.store.digest import HashingFile, digest_of_rows
from megatron_grit.store.files import replacing_path
from megatron_grit.store.rows import read_rows
from megatron_grit.store.sealed import read_sealed, write_sealed

NONE = -1
COLUMNS: dict[str, tuple[str, tuple[int, ...]]] = {
    "neighbors": ("<i8", ()),
    "scores": ("<f4", ()),
    "sources": ("<u4", (3,)),
}
"""What a table holds of each neighbor, by the names of its files: type, and shape beside places and neighbors. The
chunk's id; its squared distance or its product, by which neighbors are in order; dataset, document and first token.
Where there is no neighbor the id is -1, and the rest has no meaning."""
_REMEDY = "run --tasks query-neighbors again, or delete its folder where it is of other settings"
_DOCUMENTS_AT_A_TIME = 1 << 16


@dataclass(kw_only=True)
class TableManifest:
    """``table.json``."""

    source: Source
    """The documents that the neighbors are for."""
    datasets: list[int]
    """Numbers that these documents' file has in the database; none where it is not part of it."""
    settings: str
    """Digest of all that a row follows from beside the documents: index, embedder, search, filters."""
    chunk_length: int
    num_neighbors: int
    num_places: int
    version: int
    """Of the database that the ids are of."""
    database: str
    """Fingerprint of its chunks."""
    embedder: str
    nprobe: int | None
    ef_search: int | None
    recall: float | None
    """Of the index, measured when it was built. None: not measured with this nprobe and ef_search."""
    num_taken_over: int = 0
    """Places whose neighbors an earlier table had."""
    num_short: int | None = None
    """Places with fewer than ``num_neighbors``. None: not counted."""
    num_none: int | None = None
    """Of these, places with none."""
    num_copies: int | None = None
    """Candidates that were left out because they repeat the chunk, in the searches for this table and for those that it
    goes on from. None: not counted."""
    sha256: str = ""
    """Of the numbers of ``neighbors.npy``."""
    starts_sha256: str = ""
    """Of those of ``starts.npy``."""
    scores_sha256: str = ""
    """Of those of ``scores.npy``. Empty: of an older table, which has neither these nor ``sources.npy``."""
    sources_sha256: str = ""
    """Of those of ``sources.npy``."""


def read_table_manifest(folder: Path) -> TableManifest:
    """The manifest of a table.

    Raises:
        DataError: it is missing or cannot be read.
    """
    path = folder / "table.json"
    try:
        values = read_sealed(path)
        return TableManifest(**values | {"source": Source(**values["source"])})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"cannot be read ({error}); {_REMEDY}", path=path) from None


class NeighborTable:
    """Neighbors of one indexed file's chunks.

    Args:
        folder: where :func:`write_table` wrote it.
        documents_of: uint32 [num_chunks, 3 or more], whose first columns are dataset, document and first token of each
            chunk of the database: ``rows`` of the version that the table is of. Only tables that say nothing of
            documents need it.
        database: fingerprint of the chunks of that version. None: not compared.

    Attributes:
        neighbors: int64 [num_places, num_neighbors], mapped, as all of them are.
        scores: float32 [num_places, num_neighbors]; None in older tables.
        sources: uint32 [num_places, num_neighbors, 3]: dataset, document, first token; None in older tables.
        starts: int64 [num_documents + 1], chunk positions before each document.

    Raises:
        DataError: it is missing or damaged, or of another database.
    """

    def __init__(self, folder: Path, documents_of: np.ndarray | None = None, database: str | None = None) -> None:
        self.folder, self._documents_of = folder, documents_of
        self.manifest = manifest = read_table_manifest(folder)
        if database not in (None, manifest.database):
            raise DataError(f"is of another database; {_REMEDY}", path=folder / "table.json")
        shape = (manifest.num_places, manifest.num_neighbors)
        self.neighbors = _mapped(folder / "neighbors.npy", np.int64, shape)
        self.scores = self.sources = None
        if manifest.scores_sha256:
            self.scores = _mapped(folder / "scores.npy", np.float32, shape)
            self.sources = _mapped(folder / "sources.npy", np.uint32, (*shape, 3))
        self.starts = _mapped(folder / "starts.npy", np.int64, (manifest.source.num_documents + 1,))
        self._compare()

    def check_source(self, prefix: Path) -> None:
        """Compare the file that is trained on with the one that was queried. Documents may have been appended.

        Raises:
            DataError: they differ.
        """
        if not begins_with(prefix, self.manifest.source):
            raise DataError("has changed since its neighbors were searched; run --tasks query-neighbors", path=prefix)

    def verify(self) -> None:
        """Read all of the table and compare it with its checksum; samples of it were compared when it was opened.

        Raises:
            DataError: they differ.
        """
        with thoroughly():
            self._compare()

    def _compare(self) -> None:
        for name, array, sha256 in (
            ("neighbors.npy", self.neighbors, self.manifest.sha256),
            ("scores.npy", self.scores, self.manifest.scores_sha256),
            ("sources.npy", self.sources, self.manifest.sources_sha256),
            ("starts.npy", self.starts, self.manifest.starts_sha256),
        ):
            if array is None:
                continue
            path = self.folder / name
            if content_part(path, "rows", lambda array=array: digest_of_rows(array)) != sha256:  # type: ignore[misc]
                raise DataError(f"does not match its checksum; {_REMEDY}", path=path)

    def places(self, chunks: Sequence[tuple[int, int]] | np.ndarray) -> np.ndarray:
        """Rows of chunks, by document and first token: int64 [n].

        Raises:
            IndexError: no chunk begins at one of them.
        """
        pairs = np.asarray(chunks, dtype=np.int64).reshape(-1, 2)
        documents, offsets = pairs[:, 0], pairs[:, 1]
        known = (documents >= 0) & (documents < self.manifest.source.num_documents)
        safe = np.where(known, documents, 0)
        chunk, rest = np.divmod(offsets, self.manifest.chunk_length)
        if len(pairs):
            known &= (rest == 0) & (chunk >= 0) & (chunk < self.starts[safe + 1] - self.starts[safe])
        if not known.all():
            document, offset = pairs[np.argmin(known)]
            last = self.manifest.source.num_documents - 1
            why = "" if 0 <= document <= last else f", documents are 0 to {last}"
            raise IndexError(f"document {document} has no chunk at token {offset}{why}")
        return np.asarray(self.starts[safe] + chunk) if len(pairs) else chunk

    def read(
        self,
        chunks: Sequence[tuple[int, int]] | np.ndarray,
        sample_documents: Sequence[tuple[int, int]] | np.ndarray,
        k: int,
    ) -> np.ndarray:
        """The nearest neighbors of chunks that are in no document of their sample.

        Args:
            chunks: (document, first token) of each, of the file that the table is for.
            sample_documents: (dataset, document) of every document of the sample, as the database numbers them
                (``manifest.datasets``).
            k: neighbors of a chunk.

        Returns:
            int64 [len(chunks), k]: chunk ids, nearest first; -1 where there are fewer.

        Raises:
            IndexError: no chunk begins at one of the tokens.
        """
        return self.read_sources(chunks, sample_documents, k)[0]

    def read_sources(
        self,
        chunks: Sequence[tuple[int, int]] | np.ndarray,
        sample_documents: Sequence[tuple[int, int]] | np.ndarray,
        k: int,
    ) -> tuple[np.ndarray, np.ndarray]:
        """As :meth:`read`, with where the neighbors stand, so that their tokens are read without the table of chunks
        (:func:`~megatron_grit.data.chunks.chunk_db.read_places`).

        Only as many neighbors of a chunk are looked at as are needed to find ``k``.

        Returns:
            int64 [len(chunks), k], chunk ids, -1 for none; uint32 [len(chunks), k, 3], their dataset, document and
            first token, zeros for none.

        Raises:
            IndexError: no chunk begins at one of the tokens.
            DataError: an older table, and the chunks' documents were not given.
        """
        places, pairs = self.places(chunks), np.asarray(sample_documents, dtype=np.int64).reshape(-1, 2)
        documents = SampleDocuments(np.zeros(len(pairs), np.int64), document_keys(pairs[:, 0], pairs[:, 1]))
        return self.nearest(places, np.zeros(len(places), np.int64), documents, k)

    def nearest(
        self, places: np.ndarray, samples: np.ndarray, documents: SampleDocuments, k: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """As :meth:`read_sources`, of chunks of several samples.

        Args:
            places: of the chunks, int64 [n], as of :meth:`places`.
            samples: int64 [n], number of the sample of each.
            documents: of the samples.
            k: neighbors of a chunk.
        """
        most = self.manifest.num_neighbors
        width, rows = min(k, most), np.arange(len(places))
        ids, sources, keep = self._candidates(places, samples, documents, width)
        if width == k:  # most rows need no more
            ids_NK, sources_NK3, rows = ids, sources, np.flatnonzero(~keep.all(1))
            ids, sources, keep = ids[rows], sources[rows], keep[rows]
        else:
            ids_NK, sources_NK3 = np.full((len(places), k), NONE), np.zeros((len(places), k, 3), np.uint32)
        while len(rows):
            order = np.argsort(~keep, axis=1, kind="stable")[:, :k]
            there = np.take_along_axis(keep, order, 1)
            ids_NK[rows, : order.shape[1]] = np.where(there, np.take_along_axis(ids, order, 1), NONE)
            found = np.take_along_axis(sources, order[..., None], 1)
            sources_NK3[rows, : order.shape[1]] = np.where(there[..., None], found, 0)
            if width == most:
                break
            rows, width = rows[(there.sum(1) < k) & (ids[:, -1] >= 0)], min(2 * width, most)
            ids, sources, keep = self._candidates(places[rows], samples[rows], documents, width)
        return ids_NK, sources_NK3

    def _candidates(
        self, places: np.ndarray, samples: np.ndarray, documents: SampleDocuments, width: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The first ids of rows and their sources, and whether there is one and its sample does not hold it."""
        ids = self.neighbors[places, :width]
        sources = self._sources_of(places, ids)
        return ids, sources, (ids >= 0) & ~documents.hold(samples, document_keys(sources[..., 0], sources[..., 1]))

    def _sources_of(self, places: np.ndarray, ids_NK: np.ndarray) -> np.ndarray:
        if self.sources is not None:
            return np.asarray(self.sources[places, : ids_NK.shape[1]])
        if self._documents_of is None:
            raise DataError(f"says nothing of documents: it was made by an older version; {_REMEDY}", path=self.folder)
        return sources_of(self._documents_of, ids_NK)


def take_first(values_QK: np.ndarray, keep_QK: np.ndarray, k: int, fill: float = NONE) -> np.ndarray:
    """The first ``k`` kept entries of each row, in their order; ``fill`` where there are fewer."""
    order = np.argsort(~keep_QK, axis=1, kind="stable")[:, :k]
    fill_of = values_QK.dtype.type(fill)
    taken = np.where(np.take_along_axis(keep_QK, order, 1), np.take_along_axis(values_QK, order, 1), fill_of)
    return np.pad(taken, ((0, 0), (0, k - taken.shape[1])), constant_values=fill_of)


def chunk_at(
    file: IndexedFile, starts: np.ndarray, place: int, chunk_length: int, eod_id: int
) -> tuple[int, int, np.ndarray]:
    """Document, first token and tokens of the chunk at a chunk position.

    Args:
        file: the tokens.
        starts: of :func:`write_starts`.
        place: from 0 to ``starts[-1] - 1``.
        chunk_length: tokens of a chunk.
        eod_id: left out where it ends the document.
    """
    document = int(np.searchsorted(starts, place, side="right")) - 1
    offset = (place - int(starts[document])) * chunk_length
    return document, offset, document_tokens(file, document, offset, chunk_length, eod_id)


def write_starts(path: Path, file: IndexedFile, chunk_length: int, eod_id: int) -> None:
    """Write how many chunks there are before each document, and all of them: int64 [documents + 1]. A closing
    ``eod_id`` does not count. Takes the same memory for any number of documents.

    Raises:
        DataError: the file is damaged.
    """
    with replacing_path(path) as temporary, temporary.open("wb") as out:
        header = {"descr": "<i8", "fortran_order": False, "shape": (file.num_documents + 1,)}
        np.lib.format.write_array_header_2_0(out, header)
        out.write(np.zeros(1, dtype="<i8").tobytes())
        total = 0
        for first in range(0, file.num_documents, _DOCUMENTS_AT_A_TIME):
            last = min(first + _DOCUMENTS_AT_A_TIME, file.num_documents)
            ends = total + np.cumsum(-(-_lengths(file, first, last, eod_id) // chunk_length))
            out.write(ends.astype("<i8").tobytes())
            total = int(ends[-1])


def _lengths(file: IndexedFile, first: int, last: int, eod_id: int) -> np.ndarray:
    """Tokens of documents, without a closing ``eod_id``: int64."""
    edges = file.documents[first : last + 1]
    begin, end = int(edges[0]), int(edges[-1])
    if not 0 <= begin <= end <= file.num_sequences or (np.diff(edges) < 0).any():
        raise DataError(f"documents {first} to {last} are out of order; preprocess it again", path=file.idx_path)
    sums = np.concatenate(([0], np.cumsum(file.lengths[begin:end], dtype=np.int64)))
    lengths = np.diff(sums[edges - begin])
    filled = np.flatnonzero(lengths)
    if len(filled):
        # A map of this part alone: its pages are given back with it.
        size, place = file.dtype.itemsize, int(file.pointers[begin])
        if place + int(sums[-1]) * size > file.bin_bytes:
            raise DataError(f"documents {first} to {last} end beyond it; preprocess it again", path=file.bin_path)
        tokens = np.memmap(file.bin_path, dtype=file.dtype, mode="r", offset=place, shape=(int(sums[-1]),))
        lengths[filled] -= tokens[sums[edges[1:] - begin][filled] - 1] == eod_id
    return lengths


def write_table(folder: Path, parts: Iterable[Mapping[str, np.ndarray]], manifest: TableManifest) -> None:
    """Write a table, beside the ``starts.npy`` of :func:`write_starts`; it is there when its manifest is.

    Args:
        folder: made where it is not there.
        parts: :data:`COLUMNS` of runs of chunk positions, in order.
        manifest: what it is of; its checksums and counts are filled in.
    """
    shape, files = (manifest.num_places, manifest.num_neighbors), {}
    with ExitStack() as stack:
        for name, (dtype, rest) in COLUMNS.items():
            path = stack.enter_context(replacing_path(folder / f"{name}.npy"))
            file = stack.enter_context(path.open("wb"))
            header = {"descr": dtype, "fortran_order": False, "shape": (*shape, *rest)}
            np.lib.format.write_array_header_2_0(file, header)
            files[name] = HashingFile(file)
        manifest.num_short = manifest.num_none = 0
        for part in parts:
            manifest.num_short += int((part["neighbors"][:, -1] < 0).sum())
            manifest.num_none += int((part["neighbors"][:, 0] < 0).sum())
            for name, (dtype, _) in COLUMNS.items():
                files[name].write(np.ascontiguousarray(part[name], dtype=dtype).tobytes())
    manifest.sha256, manifest.scores_sha256, manifest.sources_sha256 = (
        files[name].entry()["sha256"] for name in ("neighbors", "scores", "sources")
    )
    manifest.starts_sha256 = digest_of_rows(np.load(folder / "starts.npy", mmap_mode="r", allow_pickle=False))
    write_sealed(folder / "table.json", asdict(manifest))


def _mapped(path: Path, dtype: type, shape: tuple[int, ...]) -> np.ndarray:
    try:
        array = read_rows(path, dtype, mapped=0 not in shape)
    except (OSError, ValueError) as error:
        raise DataError(f"cannot be read ({error}); {_REMEDY}", path=path) from None
    if array.shape != shape:
        wanted = f"{np.dtype(dtype)} {shape}"
        raise DataError(f"holds {array.dtype} {array.shape} and not {wanted}; {_REMEDY}", path=path)
    return array
