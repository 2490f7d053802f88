"""Neighbors of every chunk of the documents that are trained on."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megatron_grit.data.block_files import Arrays, Block, BlockFolder
from megatron_grit.data.chunk_db import DATASET, DOCUMENT, ChunkDb
from megatron_grit.data.indexed import IndexedFile
from megatron_grit.data.neighbor_table import TableManifest, take_first, write_table
from megatron_grit.data.retro_project import Project, fingerprint
from megatron_grit.parallel.logs import get_logger
from megatron_grit.retrieval.embed import Embedder
from megatron_grit.retrieval.faiss_index import ShardedIndex, read_manifest
from megatron_grit.retrieval.index import IndexFiles, read_search
from megatron_grit.retrieval.work import Worker, compute_blocks

log = get_logger(__name__)

_NGRAM = 8


def query_neighbors(project: Project, worker: Worker, embedder: Embedder) -> None:
    """The stage query-neighbors, for the datasets of the database and those of ``query_paths``. All processes call it.

    Raises:
        DataError: the index is missing, damaged or of another embedder.
    """
    db = ChunkDb(project)
    files = IndexFiles(project, db, embedder.fingerprint, embedder.dim)
    settings = read_search(files.search)
    prefixes = project.config.query_paths or project.config.data_paths
    index: ShardedIndex | None = None
    for prefix in prefixes:
        searcher = Searcher(project, db, files, prefix)
        folder = searcher.folder
        if (folder / "table.json").is_file():
            continue
        if index is None:
            index = ShardedIndex.load(files.added, mapped=True, embedder=files.embedder, chunks=files.chunks)
            index.set_search(settings.nprobe, settings.ef_search)
        searcher.index, searcher.embedder = index, embedder
        compute_blocks(searcher.blocks, searcher.compute, worker, f"neighbors for {prefix}")
        if worker.is_first:
            searcher.write_table(settings.recall)
        worker.barrier()


class Searcher:
    """The neighbors of one indexed file's chunks.

    Args:
        project: the database.
        db: its chunks.
        files: its index.
        prefix: of the documents.
    """

    index: ShardedIndex
    embedder: Embedder

    def __init__(self, project: Project, db: ChunkDb, files: IndexFiles, prefix: str) -> None:
        self.project, self.db, self.files, self.prefix = project, db, files, prefix
        self.config = config = project.config
        self.path = project.resolve(prefix)
        self.file = IndexedFile(self.path)
        self.dataset = config.data_paths.index(prefix) if prefix in config.data_paths else None
        self.starts = chunk_starts(self.file, config.chunk_length, project.tokenizer.eos_id)
        search = read_search(files.search)
        self.manifests = [read_manifest(path) for path in files.added]
        signature = {
            "task": "neighbors",
            "tokens": fingerprint(self.path),
            "chunk_length": config.chunk_length,
            "index": [manifest.sha256 for manifest in self.manifests],
            "embedder": files.embedder,
            "nprobe": search.nprobe,
            "ef_search": search.ef_search,
            "num_neighbors": [config.num_neighbors_query, config.num_neighbors_save],
            "max_overlap": config.max_overlap,
            "query_instruction": config.query_instruction,
        }
        self.blocks = BlockFolder(Path(), int(self.starts[-1]), config.block_size, signature)
        self.folder = project.folder / "query" / f"{self.path.name}_{self.blocks.signature[:16]}"
        self.blocks = BlockFolder(self.folder, int(self.starts[-1]), config.block_size, signature)

    def compute(self, block: Block) -> Arrays:
        """Neighbors of a block of places: int64 [n, num_neighbors_save]."""
        documents, offsets, tokens = self._chunks(block)
        decode = self.project.tokenizer.decode
        texts = [decode(ids.tolist()) for ids in tokens]
        asked = np.array([bool(text.strip()) for text in texts], dtype=bool)
        out = np.full((len(block), self.config.num_neighbors_save), -1, dtype=np.int64)
        if asked.any():
            vectors = self.embedder.embed([text for text, ask in zip(texts, asked, strict=True) if ask], "query")
            _, found = self.index.search(vectors, self.config.num_neighbors_query)
            keep = found >= 0
            if self.dataset is not None:
                rows = self.db.rows[np.where(keep, found, 0)]
                own = documents[asked][:, None]
                keep &= (rows[..., DATASET] != self.dataset) | (rows[..., DOCUMENT] != own)
            if self.config.max_overlap is not None:
                keep &= self._overlap(documents[asked], offsets[asked], found, keep) <= self.config.max_overlap
            out[asked] = take_first(found, keep, self.config.num_neighbors_save)
        return {"neighbors": out}

    def _chunks(self, block: Block) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
        """Document, first token and tokens of each place."""
        length = self.config.chunk_length
        places = np.arange(block.start, block.stop)
        documents = np.searchsorted(self.starts, places, side="right") - 1
        offsets = (places - self.starts[documents]) * length
        tokens: list[np.ndarray] = []
        for document in np.unique(documents):
            whole = self._document(int(document))
            tokens += [whole[start : start + length] for start in offsets[documents == document]]
        return documents, offsets, tokens

    def _document(self, document: int) -> np.ndarray:
        tokens = self.file.read(*self.file.sequences(document))
        return tokens[:-1] if len(tokens) and tokens[-1] == self.project.tokenizer.eos_id else tokens

    def _overlap(self, documents: np.ndarray, offsets: np.ndarray, found: np.ndarray, keep: np.ndarray) -> np.ndarray:
        """Share of each neighbor's runs of eight tokens, continuation included, that stand in the query's chunk or
        the one after it: float64 [Q, K]."""
        span = 2 * self.config.chunk_length
        out = np.zeros(found.shape)
        runs: dict[int, set[bytes]] = {}
        for query, (document, offset) in enumerate(zip(documents, offsets, strict=True)):
            own = _runs(self._document(int(document))[offset : offset + span])
            for place in np.flatnonzero(keep[query]):
                neighbor = int(found[query, place])
                if neighbor not in runs:
                    runs[neighbor] = _runs(self.db.tokens(neighbor, num_tokens=span))
                theirs = runs[neighbor]
                out[query, place] = len(theirs & own) / max(len(theirs), 1)
        return out

    def write_table(self, recall: float) -> None:
        """Join the blocks into the table that training reads."""
        search = read_search(self.files.search)
        manifest = TableManifest(
            prefix=self.prefix,
            tokens=fingerprint(self.path),
            chunk_length=self.config.chunk_length,
            num_neighbors=self.config.num_neighbors_save,
            num_documents=self.file.num_documents,
            num_places=int(self.starts[-1]),
            database=self.files.chunks,
            embedder=self.files.embedder,
            index_sha256=[manifest.sha256 for manifest in self.manifests],
            nprobe=search.nprobe,
            ef_search=search.ef_search,
            recall=recall,
        )
        parts = (self.blocks.read(block)["neighbors"] for block in self.blocks.blocks)
        write_table(self.folder, self.starts, parts, manifest)


def chunk_starts(file: IndexedFile, chunk_length: int, eod_id: int) -> np.ndarray:
    """Chunks before each document, and all of them: int64 [documents + 1]. A closing ``eod_id`` does not count."""
    ends = np.concatenate(([0], np.cumsum(file.lengths, dtype=np.int64)))
    lengths = np.diff(ends[file.documents])
    tokens = np.memmap(file.bin_path, dtype=file.dtype, mode="r") if file.bin_bytes else np.empty(0, file.dtype)
    last = ends[file.documents[1:]] - 1
    closing = np.where(lengths > 0, tokens[np.maximum(last, 0)] if len(tokens) else eod_id, eod_id)
    lengths = lengths - ((closing == eod_id) & (lengths > 0))
    return np.concatenate(([0], np.cumsum(-(-lengths // chunk_length)))).astype(np.int64)


def _runs(tokens: np.ndarray) -> set[bytes]:
    content = np.ascontiguousarray(tokens, dtype=np.int32).tobytes()
    width = min(_NGRAM, len(tokens))
    return {content[4 * place : 4 * (place + width)] for place in range(len(tokens) - width + 1)} if width else set()
