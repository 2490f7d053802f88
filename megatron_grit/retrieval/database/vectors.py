"""Vectors of the chunks of a database: from disk where the task embed wrote them, else from the embedder."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_grit.config.database.settings import setting_in_use
from megatron_grit.data.chunks.chunk_db import DOCUMENT, START, ChunkDb, map_dataset
from megatron_grit.data.chunks.project import DatasetInfo, Project
from megatron_grit.inference.encoders.protocol import Embedder
from megatron_grit.retrieval.work import Worker, compute_blocks
from megatron_grit.store.blocks import Arrays, Block, BlockFolder
from megatron_grit.store.digest import digest_of_settings

_FEW_TO_SKIP = 64
"""Rows for each one that is wanted, up to which a table is read from the first to the last of them."""


class ChunkVectors:
    """Vectors of chunks by their ids. They are rounded to ``embedding_dtype`` whether or not they are stored.

    Args:
        project: the database.
        db: its chunks.
        embedder: what makes the vectors.
        chunks: fingerprint of the chunks.
        folder: of their blocks. None: that of the chunks that the database was built of.

    Attributes:
        blocks: where the task embed writes them: ``data``, [n, dim], in blocks of ``block_size`` chunks.
        stored: whether all of them are there; after :meth:`look`.
    """

    def __init__(
        self, project: Project, db: ChunkDb, embedder: Embedder, chunks: str, folder: Path | None = None
    ) -> None:
        self.db, self.embedder = db, embedder
        self.dtype = np.dtype(project.config.embedding_dtype)
        signature = {"task": "embed", "chunks": chunks, "embedder": embedder.fingerprint, "dtype": self.dtype.str}
        remedy = "run --tasks embed" if folder is None else "run --tasks add"
        folder = folder or project.folder / "embeddings"
        self.blocks = BlockFolder(folder, len(db), project.config.block_size, signature, remedy)
        self.stored = False

    def look(self, worker: Worker) -> None:
        """See whether the vectors are stored. All processes call it."""
        self.stored = worker.from_first(
            lambda: all(self.blocks.problem(block, thorough=False) is None for block in self.blocks.blocks)
        )

    def compute(self, block: Block) -> Arrays:
        """Embed a block: what the task embed writes."""
        return {"data": self.embedder.embed(self.db.texts(np.arange(block.start, block.stop))).astype(self.dtype)}

    def of(self, ids: np.ndarray) -> np.ndarray:
        """Vectors of chunks.

        Args:
            ids: int64 [n], in any order.

        Returns:
            float32 [n, dim].
        """
        if not self.stored:
            return self.embedder.embed(self.db.texts(ids)).astype(self.dtype).astype(np.float32)
        return rows_of(self.blocks, ids, self.embedder.dim)

    def of_block(self, block: Block, count: int) -> np.ndarray:
        """Vectors of the first ``count`` chunks of a block, float32 [count, dim]; stored ones are compared with their
        checksum.

        Raises:
            DataError: the stored block is damaged.
        """
        if not self.stored:
            return self.of(np.arange(block.start, block.start + count))
        return self.blocks.read(self.blocks.blocks[block.number])["data"][:count].astype(np.float32)


class SegmentVectors:
    """Vectors of the chunks of one version of a database, of those segments of which they are stored.

    Args:
        parts: of each segment, in order, after :meth:`ChunkVectors.look`.

    Attributes:
        parts: the same.
    """

    def __init__(self, parts: Sequence[ChunkVectors]) -> None:
        self.parts, self._embedder, self._dtype = list(parts), parts[0].embedder, parts[0].dtype
        self._ends = np.cumsum([len(part.db) for part in parts])

    @property
    def stored(self) -> bool:
        """Whether those of all chunks are."""
        return all(part.stored for part in self.parts)

    def of(self, ids: np.ndarray) -> np.ndarray:
        """As :meth:`ChunkVectors.of`."""
        out = np.empty((len(ids), self._embedder.dim), dtype=np.float32)
        numbers = np.searchsorted(self._ends, ids, side="right")
        for number in np.unique(numbers).tolist():
            part, here = self.parts[number], numbers == number
            out[here] = part.of(ids[here] - (self._ends[number] - len(part.db)))
        return out

    def of_queries(
        self, dataset: int | None, documents: np.ndarray, offsets: np.ndarray, texts: Sequence[str]
    ) -> np.ndarray:
        """Vectors of texts to search with, rounded as those of chunks are. Those of the database's own chunks are taken
        from disk where queries and passages are embedded alike.

        Args:
            dataset: that the texts are of. None: none of the database.
            documents: int [n], ascending.
            offsets: int [n], first token of each text in its document.
            texts: n of them.

        Returns:
            float32 [n, dim].
        """
        out = np.empty((len(texts), self._embedder.dim), dtype=np.float32)
        rest = np.ones(len(texts), dtype=bool)
        if dataset is not None and self._embedder.sides_alike and len(texts):
            for part in self.parts:
                if not part.stored or not len(part.db):
                    continue
                ids = find_chunks(part.db.rows, dataset, documents, offsets)
                out[ids >= 0] = part.of(ids[ids >= 0])
                rest &= ids < 0
        if rest.any():
            asked = self._embedder.embed([texts[number] for number in np.flatnonzero(rest)], "query")
            out[rest] = asked.astype(self._dtype)
        return out


def rows_of(blocks: BlockFolder, ids: np.ndarray, dim: int) -> np.ndarray:
    """Rows of the arrays ``data`` of blocks, by item and in any order: float32 [n, dim]. What is not asked for is not
    read."""
    out = np.empty((len(ids), dim), dtype=np.float32)
    numbers = ids // blocks.block_size
    order = np.argsort(numbers, kind="stable")
    for part in np.split(order, np.flatnonzero(np.diff(numbers[order])) + 1) if len(ids) else []:
        block = blocks.blocks[int(numbers[part[0]])]
        out[part] = map_dataset(block.path, "data", blocks.remedy)[ids[part] - block.start]
    return out


def find_chunks(rows: np.ndarray, dataset: int, documents: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Ids of the chunks that begin at tokens of documents; -1 where there is none, as for a chunk that was left out.

    Args:
        rows: uint32 [num_chunks, 5], of :class:`ChunkDb`, in the order of dataset, document and token.
        dataset: their number.
        documents: int [n], ascending.
        offsets: int [n].

    Returns:
        int64 [n].
    """

    def key(place: int) -> tuple[int, int]:
        return int(rows[place, 0]), int(rows[place, 1])

    # The table is mapped: a search touches a few pages of it, a comparison of whole columns all.
    places = range(len(rows))
    first = bisect.bisect_left(places, (dataset, int(documents[0])), key=key)
    last = bisect.bisect_right(places, (dataset, int(documents[-1])), key=key)
    wanted = (documents.astype(np.int64) << 32) | offsets.astype(np.int64)
    if first == last:
        return np.full(len(wanted), -1, dtype=np.int64)

    def keys_at(ids: np.ndarray | slice) -> np.ndarray:
        part = np.asarray(rows[ids])
        return (part[:, DOCUMENT].astype(np.int64) << 32) | part[:, START]

    if last - first <= _FEW_TO_SKIP * len(wanted):
        found = np.searchsorted(keys_at(slice(first, last)), wanted) + first
    else:  # far apart: reads of each what a binary search passes
        found, end = np.full(len(wanted), first, dtype=np.int64), np.full(len(wanted), last, dtype=np.int64)
        while (found < end).any():
            middle = np.minimum((found + end) // 2, last - 1)
            is_before = (keys_at(middle) < wanted) & (found < end)
            found, end = np.where(is_before, middle + 1, found), np.where(is_before, end, np.minimum(middle, end))
    found = np.minimum(found, last - 1)
    return np.where(keys_at(found) == wanted, found, -1).astype(np.int64)


def chunks_fingerprint(project: Project, datasets: Sequence[DatasetInfo]) -> str:
    """Of the chunks that a database was built of: what they were cut from and how."""
    names = ("chunk_length", "min_chunk_tokens", "duplicates", "near_threshold", "valid_fraction", "seed")
    settings = {name: setting_in_use(project.config, name) for name in names}
    infos = [[info.prefix, info.fingerprint, info.n_docs, info.n_chunks_train] for info in datasets]
    return digest_of_settings({"infos": infos, "tokenizer": project.tokenizer.fingerprint} | settings)


def open_vectors(project: Project, worker: Worker, embedder: Embedder, db: ChunkDb | None = None) -> ChunkVectors:
    """The vectors of the chunks that a database was built of. All processes call it.

    Args:
        project: the database.
        worker: this process.
        embedder: what makes the vectors.
        db: the chunks. None: those of the project.
    """
    db = db or ChunkDb(project)
    vectors = ChunkVectors(project, db, embedder, chunks_fingerprint(project, db.infos))
    vectors.look(worker)
    return vectors


def embed_chunks(vectors: ChunkVectors, worker: Worker) -> None:
    """Write the vectors of all chunks. All processes call it."""
    compute_blocks(vectors.blocks, vectors.compute, worker, "embeddings")
    vectors.look(worker)
