"""Neighbors of every chunk of the documents that are trained on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from megatron_grit.data.block_files import Arrays, Block, BlockFolder, digest_of_settings
from megatron_grit.data.db_versions import (
    Version,
    VersionedDb,
    begins_with,
    document_keys,
    is_among,
    source_of,
)
from megatron_grit.data.indexed import IndexedFile
from megatron_grit.data.neighbor_table import (
    NeighborTable,
    TableManifest,
    read_table_manifest,
    take_first,
    write_starts,
    write_table,
)
from megatron_grit.data.retro_project import Project, fingerprint
from megatron_grit.errors import DataError
from megatron_grit.files import write_json
from megatron_grit.parallel.logs import get_logger
from megatron_grit.retrieval.embed import Embedder
from megatron_grit.retrieval.index_search import SearchableIndex
from megatron_grit.retrieval.overlap import Runs, shared_runs
from megatron_grit.retrieval.vectors import ChunkVectors
from megatron_grit.retrieval.versions import open_index, search_of, stored_vectors, version_to_use
from megatron_grit.retrieval.work import Worker, compute_blocks

log = get_logger(__name__)

MOST_TIMES_MORE = 16
"""Where filters leave fewer neighbors than are kept, so many times more are searched at most."""
_AT_A_TIME = 4096
"""Chunks that are searched at a time, which bounds the memory of their candidates."""


def query_neighbors(project: Project, worker: Worker, embedder: Embedder) -> None:
    """The stage query-neighbors, for the datasets of the database and those of ``query_paths``. All processes call it.

    Raises:
        DataError: the index is missing, damaged or of another embedder.
    """
    version = version_to_use(project, worker, embedder)
    db = VersionedDb(project, version)
    index: SearchableIndex | None = None
    vectors = stored_vectors(db, worker, embedder)
    for prefix in project.config.query_paths or project.config.data_paths[: len(version.sources)]:
        searcher = Searcher(project, db, prefix)
        if searcher.is_done:
            continue
        if index is None:
            index = index_to_search(project, version, worker)
        searcher.prepare(worker)
        searcher.index, searcher.embedder, searcher.vectors = index, embedder, vectors
        during = None if index is None else index.serving()
        compute_blocks(searcher.blocks, searcher.compute, worker, f"neighbors for {prefix}", during=during)
        if worker.is_first:
            searcher.write_table()
        worker.barrier()


def index_to_search(project: Project, version: Version, worker: Worker) -> SearchableIndex | None:
    """The index of a version where this process searches in it; None where another one of its team does that for it,
    and no other needs it. All processes call it."""
    if worker.leads or project.config.index_placement == "spread":
        return open_index(project, version, worker)
    return None


def find_allowed(
    index: SearchableIndex,
    vectors_QD: np.ndarray,
    num_query: int,
    num_save: int,
    allowed: Callable[[np.ndarray, np.ndarray], np.ndarray],
) -> np.ndarray:
    """The nearest chunks that a filter lets through. Where it leaves too few, more are searched.

    Args:
        index: what is searched.
        vectors_QD: queries.
        num_query: candidates of each query at first.
        num_save: chunks that are wanted.
        allowed: given numbers of queries, [R], and candidates, int64 [R, K], -1 for none: bool [R, K].

    Returns:
        int64 [Q, num_save], nearest first; -1 where there are fewer.
    """
    out = np.full((len(vectors_QD), num_save), -1, dtype=np.int64)
    rows, most = np.arange(len(vectors_QD)), max(1, min(len(index), MOST_TIMES_MORE * num_query))
    k = min(num_query, most)
    while len(rows):
        short = []
        # No more candidates at a time than the first search has.
        at_a_time = max(1, len(vectors_QD) * num_query // k)
        for part in np.split(rows, range(at_a_time, len(rows), at_a_time)):
            _, ids = index.search(vectors_QD[part], k)
            keep = (ids >= 0) & allowed(part, ids)
            out[part] = take_first(ids, keep, num_save)
            short.append(part[(keep.sum(1) < num_save) & (ids[:, -1] >= 0)])
        if k == most:
            break
        rows, k = np.concatenate(short), min(2 * k, most)
    return out


class Searcher:
    """The neighbors of one indexed file's chunks.

    A table that was made of the first documents of the same file with the same index and settings is taken over; only
    the places after it are searched.

    Args:
        project: the database.
        db: one version of its chunks.
        prefix: of the documents.

    Attributes:
        folder: of the blocks and the table, named by all that they follow from.
        starts: int64 [documents + 1], places before each document, mapped; after :meth:`prepare`.
        blocks: of the places that are searched; after :meth:`prepare`.
        first: first place that is searched; after :meth:`prepare`.
        index: set it before :meth:`compute`. None: this process embeds with others, one of which searches.
        embedder: likewise.
        vectors: of the database's chunks, where they are stored.
    """

    index: SearchableIndex | None = None
    embedder: Embedder
    vectors: ChunkVectors | None = None
    starts: np.ndarray
    blocks: BlockFolder
    first: int

    def __init__(self, project: Project, db: VersionedDb, prefix: str) -> None:
        self.project, self.db, self.prefix = project, db, prefix
        self.config = config = project.config
        self.path = project.resolve(prefix)
        self.file = IndexedFile(self.path)
        self.datasets = db.dataset_numbers(self.path)
        version: Version = db.version
        self.search = search_of(project, version)
        self._signature = {
            "task": "neighbors",
            "chunk_length": config.chunk_length,
            "tokenizer": project.tokenizer.fingerprint,
            "index": [file.sha256 for segment in version.segments for file in segment.index],
            "tombstones": version.tombstones.sha256 if version.tombstones else None,
            "datasets": self.datasets,
            "embedder": version.embedder,
            "nprobe": self.search.nprobe,
            "ef_search": self.search.ef_search,
            "num_neighbors": [config.num_neighbors_query, config.num_neighbors_save],
            "max_overlap": config.max_overlap,
            "query_instruction": config.query_instruction,
        }
        self.settings = digest_of_settings(self._signature)
        name = digest_of_settings({"settings": self.settings, "tokens": fingerprint(self.path)})
        self.folder = project.folder / "query" / f"{self.path.name}_{name[:16]}"

    @property
    def is_done(self) -> bool:
        """Whether the table is there."""
        return (self.folder / "table.json").is_file()

    def prepare(self, worker: Worker) -> None:
        """Count the places and look for a table to go on from. All processes call it."""
        taken = self.folder / "taken_over.json"
        if worker.is_first and not self.is_done:
            self.folder.mkdir(parents=True, exist_ok=True)
            eod = self.project.tokenizer.eos_id
            write_starts(self.folder / "starts.npy", self.file, self.config.chunk_length, eod)
            write_json(taken, {"table": self._earlier_table()})
        worker.barrier()
        self.starts = np.asarray(np.load(self.folder / "starts.npy", mmap_mode="r"))
        self.table = json.loads(taken.read_text(encoding="utf-8"))["table"]
        self.first = 0 if self.table is None else read_table_manifest(self.folder.parent / self.table).num_places
        if worker.is_first and self.first:
            log.info(f"{self.prefix}: neighbors of {self.first:,} chunks are those of an earlier table")
        signature = self._signature | {"tokens": fingerprint(self.path), "first": self.first}
        self.blocks = BlockFolder(self.folder, int(self.starts[-1]) - self.first, self.config.block_size, signature)

    def _earlier_table(self) -> str | None:
        """Folder of the longest table of the first documents of this file, with this index and these settings."""
        best: tuple[int, str] | None = None
        for path in sorted(self.folder.parent.glob("*/table.json")):
            try:
                manifest = read_table_manifest(path.parent)
                if manifest.settings != self.settings or (best and manifest.num_places <= best[0]):
                    continue
                if begins_with(self.path, manifest.source):
                    NeighborTable(path.parent, self.db.rows).verify()
                    best = manifest.num_places, path.parent.name
            except DataError as error:
                log.warning(f"not gone on from: {error}")
        return best[1] if best else None

    def compute(self, block: Block) -> Arrays:
        """Neighbors of a block of places: int64 [n, num_neighbors_save]."""
        parts = [
            self._compute(self.first + start, self.first + min(start + _AT_A_TIME, block.stop))
            for start in range(block.start, block.stop, _AT_A_TIME)
        ]
        return {"neighbors": np.concatenate(parts)}

    def _compute(self, start: int, stop: int) -> np.ndarray:
        documents, offsets, tokens = self.chunks(start, stop)
        decode = self.project.tokenizer.decode
        texts = [decode(ids.tolist()) for ids in tokens]
        asked = np.flatnonzero([bool(text.strip()) for text in texts])
        out = np.full((stop - start, self.config.num_neighbors_save), -1, dtype=np.int64)
        if not len(asked):
            return out
        texts, documents, offsets = [texts[number] for number in asked], documents[asked], offsets[asked]
        if self.vectors is None or not self.datasets:
            vectors = self.embedder.embed(texts, "query")
        else:
            vectors = self.vectors.of_queries(self.datasets[0], documents, offsets, texts)
        if self.index is None:
            return out

        def allowed(rows: np.ndarray, ids: np.ndarray) -> np.ndarray:
            keys = self.db.keys(ids)
            keep = (ids >= 0) & ~is_among(keys, self.db.tombstones)
            for dataset in self.datasets:
                own = document_keys(np.full(len(rows), dataset), documents[rows])
                keep &= keys != own[:, None]
            if self.config.max_overlap is not None:
                self._drop_overlapping(documents[rows], offsets[rows], ids, keep)
            return keep

        config = self.config
        out[asked] = find_allowed(self.index, vectors, config.num_neighbors_query, config.num_neighbors_save, allowed)
        return out

    def chunks(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
        """Document, first token and tokens of places ``start`` to ``stop - 1``."""
        length = self.config.chunk_length
        places = np.arange(start, stop)
        documents = np.searchsorted(self.starts, places, side="right") - 1
        offsets = (places - self.starts[documents]) * length
        tokens: list[np.ndarray] = []
        edges = np.flatnonzero(np.diff(documents, prepend=-1, append=-2))
        for first, last in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
            begin = int(offsets[first])
            span = self._span(int(documents[first]), begin, int(offsets[last - 1]) + length - begin)
            tokens += [span[place - begin : place - begin + length] for place in offsets[first:last].tolist()]
        return documents, offsets, tokens

    def _span(self, document: int, begin: int, count: int) -> np.ndarray:
        """Tokens of a document from one on, without its end-of-document token; fewer at its end."""
        first, last = self.file.sequences(document)
        length = int(self.file.lengths[first:last].sum(dtype=np.int64))
        tokens = self.file.read(first, last, begin, min(count, length - begin))
        ends = begin + len(tokens) == length and len(tokens) and tokens[-1] == self.project.tokenizer.eos_id
        return tokens[:-1] if ends else tokens

    def _drop_overlapping(self, documents: np.ndarray, offsets: np.ndarray, ids: np.ndarray, keep: np.ndarray) -> None:
        """Clear ``keep`` where a neighbor and its continuation repeat the query's chunk or the one after it. Neighbors
        are read until enough of them are left."""
        assert self.config.max_overlap is not None
        span, wanted = 2 * self.config.chunk_length, self.config.num_neighbors_save
        seen: dict[int, Runs] = {}
        for query, (document, offset) in enumerate(zip(documents.tolist(), offsets.tolist(), strict=True)):
            own = Runs(self._span(document, offset, span))
            good = 0
            for place in np.flatnonzero(keep[query]).tolist():
                if good == wanted:
                    keep[query, place:] = False
                    break
                neighbor = int(ids[query, place])
                if neighbor not in seen:
                    seen[neighbor] = Runs(self.db.tokens(neighbor, num_tokens=span))
                keep[query, place] = shared_runs(seen[neighbor], own) <= self.config.max_overlap
                good += int(keep[query, place])

    def write_table(self) -> None:
        """Join what was taken over and the blocks into the table that training reads."""
        version = self.db.version
        manifest = TableManifest(
            source=source_of(self.prefix, self.path),
            datasets=self.datasets,
            settings=self.settings,
            chunk_length=self.config.chunk_length,
            num_neighbors=self.config.num_neighbors_save,
            num_places=int(self.starts[-1]),
            version=version.number,
            database=version.chunks,
            embedder=version.embedder,
            nprobe=self.search.nprobe,
            ef_search=self.search.ef_search,
            recall=self.search.recall,
            num_taken_over=self.first,
        )
        write_table(self.folder, self._parts(), manifest)

    def _parts(self) -> Iterator[np.ndarray]:
        if self.table is not None:
            earlier = NeighborTable(self.folder.parent / self.table, self.db.rows).neighbors
            for start in range(0, len(earlier), self.config.block_size):
                yield earlier[start : start + self.config.block_size]
        for block in self.blocks.blocks:
            yield self.blocks.read(block)["neighbors"]


def tables_of(project: Project, prefixes: Sequence[str] | None = None) -> dict[str, Path]:
    """Folders of the newest table of each indexed file, by prefix.

    Args:
        project: the database.
        prefixes: of those files. None: all that have one.
    """
    found: dict[str, tuple[int, int, Path]] = {}
    for path in sorted((project.folder / "query").glob("*/table.json")):
        manifest = read_table_manifest(path.parent)
        rank = (manifest.version, path.stat().st_mtime_ns, path.parent)
        prefix = manifest.source.prefix
        if (prefixes is None or prefix in prefixes) and rank > found.get(prefix, (-1, -1, Path())):
            found[prefix] = rank
    return {prefix: rank[2] for prefix, rank in found.items()}
