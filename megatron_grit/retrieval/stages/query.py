"""Neighbors of every chunk of the documents that are trained on."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from megatron_grit.data.chunks.chunking import document_tokens
from megatron_grit.data.chunks.neighbor_table import (
    NeighborTable,
    TableManifest,
    read_table_manifest,
    take_first,
    write_starts,
    write_table,
)
from megatron_grit.data.chunks.project import Project, fingerprint
from megatron_grit.data.chunks.versions import (
    Version,
    VersionedDb,
    begins_with,
    document_keys,
    is_among,
    read_version,
    removed_documents,
    sorted_keys,
    source_of,
)
from megatron_grit.errors import DataError
from megatron_grit.inference.encoders.protocol import Embedder
from megatron_grit.retrieval.index.search import SearchableIndex
from megatron_grit.retrieval.stages.overlap import Runs, shared_runs
from megatron_grit.retrieval.stages.vectors import ChunkVectors
from megatron_grit.retrieval.stages.versions import open_index, search_of, stored_vectors, version_to_use
from megatron_grit.retrieval.stages.work import Worker, compute_blocks
from megatron_grit.store.blocks import Arrays, Block, BlockFolder
from megatron_grit.store.digest import digest_of_settings
from megatron_grit.store.files import replacing, write_json
from megatron_grit.store.logs import get_logger

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
        searcher = Searcher(project, db, prefix, worker)
        if searcher.is_done(worker):
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
    """The index of a version if this process searches it. None: another process of its model-parallel group searches it
    alone. All processes call it."""
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

    A table that was made of the first documents of the same file with the same index and settings is taken over; the
    places after it are searched, and, where documents were removed from the database since, those places that have one
    of them among their neighbors. The others would find what they found: what was removed came after their neighbors.

    Args:
        project: the database.
        db: one version of its chunks.
        prefix: of the documents.
        worker: this process; all of them make one together.

    Attributes:
        folder: of the blocks and the table, named by all that they follow from.
        starts: int64 [documents + 1], places before each document, mapped; after :meth:`open`.
        blocks: of the places that are searched; after :meth:`open`.
        first: places that an earlier table has; after :meth:`open`.
        again: int64, ascending: those of them that are searched all the same; after :meth:`open`.
        index: set it before :meth:`compute`. None: this process embeds with others, one of which searches.
        embedder: likewise.
        vectors: of the database's chunks, where they are stored.
    """

    index: SearchableIndex | None = None
    embedder: Embedder
    vectors: ChunkVectors | None = None
    starts: np.ndarray
    blocks: BlockFolder
    table: str | None
    first: int
    again: np.ndarray

    def __init__(self, project: Project, db: VersionedDb, prefix: str, worker: Worker) -> None:
        self.project, self.db, self.prefix = project, db, prefix
        self.config = config = project.config
        self.path = project.resolve(prefix)
        self.file = project.open(prefix)
        self.datasets = worker.from_first(lambda: db.dataset_numbers(self.path))
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

    def is_done(self, worker: Worker) -> bool:
        """Whether the table is there and whole; the first process reads it. All processes call it."""
        return worker.from_first(self._is_done)

    def _is_done(self) -> bool:
        if not (self.folder / "table.json").is_file():
            return False
        try:
            self.check()
        except DataError as error:
            log.warning(f"is made again: {error}")
            return False
        return True

    def check(self) -> None:
        """Compare the table with its checksums and with what it should be of.

        Raises:
            DataError: it is missing, damaged or something else.
        """
        table = NeighborTable(self.folder, self.db.rows)
        table.verify()
        found, config = table.manifest, self.config
        wanted = (self.settings, self.datasets, config.chunk_length, config.num_neighbors_save, int(table.starts[-1]))
        if (found.settings, found.datasets, found.chunk_length, found.num_neighbors, found.num_places) != wanted:
            raise DataError("is not of the settings of its folder; run query-neighbors again", path=self.folder)

    def prepare(self, worker: Worker) -> None:
        """Count the places and look for a table to go on from. All processes call it."""
        if worker.is_first:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "table.json").unlink(missing_ok=True)  # of a table that is damaged
            eod = self.project.tokenizer.eos_id
            write_starts(self.folder / "starts.npy", self.file, self.config.chunk_length, eod)
            self._take_over()
        worker.barrier()
        self.open()
        if worker.is_first and self.first:
            count = self.first - len(self.again)
            log.info(f"{self.prefix}: neighbors of {count:,} chunks are those of an earlier table")

    def open(self) -> None:
        """Read what was prepared.

        Raises:
            DataError: it is missing or damaged.
        """
        try:
            taken = json.loads((self.folder / "taken_over.json").read_text(encoding="utf-8"))
            self.table, self.first = taken["table"], int(taken["num_places"])
            self.starts = np.asarray(np.load(self.folder / "starts.npy", mmap_mode="r", allow_pickle=False))
            self.again = np.load(self.folder / "again.npy", allow_pickle=False)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise DataError(
                f"cannot be read ({error}); delete it and run query-neighbors again", path=self.folder
            ) from None
        signature = self._signature | {"tokens": fingerprint(self.path), "first": self.first}
        signature["again"] = hashlib.sha256(self.again.tobytes()).hexdigest()
        count = len(self.again) + int(self.starts[-1]) - self.first
        self.blocks = BlockFolder(self.folder, count, self.config.block_size, signature)

    def _take_over(self) -> None:
        """Write which table is gone on from, and which of its places are searched all the same."""
        earlier = self._earlier_table()
        again = [np.empty(0, dtype=np.int64)]
        if earlier is not None:
            table, newly_removed = earlier
            chunks = self.db.chunks_of(newly_removed)
            for start in range(0, len(table.neighbors) if len(chunks) else 0, self.config.block_size):
                part = table.neighbors[start : start + self.config.block_size]
                again.append(np.flatnonzero(is_among(part, chunks).any(axis=1)) + start)
        with replacing(self.folder / "again.npy", "wb") as file:
            np.save(file, np.concatenate(again), allow_pickle=False)
        name, count = (earlier[0].folder.name, earlier[0].manifest.num_places) if earlier else (None, 0)
        write_json(self.folder / "taken_over.json", {"table": name, "num_places": count})

    def _earlier_table(self) -> tuple[NeighborTable, np.ndarray] | None:
        """The longest table of the first documents of this file with this index and these settings, and the keys of
        the documents that were removed since; the one of the fewest such documents."""
        best: tuple[tuple[int, int], NeighborTable, np.ndarray] | None = None
        for path in sorted(self.folder.parent.glob("*/table.json")):
            try:
                manifest = read_table_manifest(path.parent)
                removed = self._removed_since(manifest)
                if removed is None or not begins_with(self.path, manifest.source):
                    continue
                rank = manifest.num_places, -len(removed)
                if best is None or rank > best[0]:
                    table = NeighborTable(path.parent, self.db.rows)
                    table.verify()
                    best = rank, table, removed
            except DataError as error:
                log.warning(f"not gone on from: {error}")
        return best[1:] if best else None

    def _removed_since(self, manifest: TableManifest) -> np.ndarray | None:
        """Keys of the documents that were removed after a table was made, ascending; None where anything else that
        rows follow from differs."""
        if manifest.settings == self.settings:
            return np.empty(0, dtype=np.uint64)
        folder = self.project.folder
        earlier = read_version(folder, manifest.version)
        digest = earlier.tombstones.sha256 if earlier.tombstones else None
        if digest_of_settings(self._signature | {"tombstones": digest}) != manifest.settings:
            return None
        removed = sorted_keys(removed_documents(folder, earlier))
        # A version that is pinned may have fewer: what the table left out would have to come in again.
        if not is_among(removed, self.db.tombstones).all():
            return None
        return np.setdiff1d(self.db.tombstones, removed)

    def compute(self, block: Block) -> Arrays:
        """Neighbors of a block of the places that are searched: int64 [n, num_neighbors_save]."""
        parts = [
            self._compute(self._places(start, min(start + _AT_A_TIME, block.stop)))
            for start in range(block.start, block.stop, _AT_A_TIME)
        ]
        return {"neighbors": np.concatenate(parts)}

    def _places(self, start: int, stop: int) -> np.ndarray:
        """The places that are searched from number ``start`` to ``stop - 1``, ascending."""
        count = len(self.again)
        rest = np.arange(max(start, count), max(stop, count)) - count + self.first
        return np.concatenate([self.again[start:stop], rest])

    def _compute(self, places: np.ndarray) -> np.ndarray:
        documents, offsets, tokens = self.chunks(places)
        decode = self.project.tokenizer.decode
        texts = [decode(ids.tolist()) for ids in tokens]
        asked = np.flatnonzero([bool(text.strip()) for text in texts])
        out = np.full((len(places), self.config.num_neighbors_save), -1, dtype=np.int64)
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

    def chunks(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
        """Document, first token and tokens of places, which ascend."""
        length = self.config.chunk_length
        documents = np.searchsorted(self.starts, places, side="right") - 1
        offsets = (places - self.starts[documents]) * length
        tokens: list[np.ndarray] = []
        # Runs of places that follow each other in a document are read at once.
        breaks = (np.diff(documents) != 0) | (np.diff(places) != 1)
        edges = np.concatenate([[0], np.flatnonzero(breaks) + 1, [len(places)]])
        for first, last in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
            begin = int(offsets[first])
            span = self._span(int(documents[first]), begin, int(offsets[last - 1]) + length - begin)
            tokens += [span[place - begin : place - begin + length] for place in offsets[first:last].tolist()]
        return documents, offsets, tokens

    def _span(self, document: int, begin: int, count: int) -> np.ndarray:
        """Tokens of a document from one on, without its end-of-document token; fewer at its end."""
        return document_tokens(self.file, document, begin, count, self.project.tokenizer.eos_id)

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
            num_taken_over=self.first - len(self.again),
        )
        write_table(self.folder, self._parts(), manifest)

    def _parts(self) -> Iterator[np.ndarray]:
        """Rows of the table in runs."""
        size, count = self.config.block_size, len(self.again)
        read = functools.lru_cache(maxsize=1)(lambda number: self.blocks.read(self.blocks.blocks[number])["neighbors"])

        def searched(start: int, stop: int) -> np.ndarray:
            parts = [
                read(number)[max(start - number * size, 0) : stop - number * size]
                for number in range(start // size, -(-stop // size))
            ]
            return np.concatenate(parts)

        if self.table is not None:
            earlier = NeighborTable(self.folder.parent / self.table, self.db.rows).neighbors
            for start in range(0, self.first, size):
                part = np.array(earlier[start : min(start + size, self.first)])
                begin, end = np.searchsorted(self.again, [start, start + len(part)]).tolist()
                if begin < end:
                    part[self.again[begin:end] - start] = searched(begin, end)
                yield part
        for start in range(count, self.blocks.num_items, size):
            yield searched(start, min(start + size, self.blocks.num_items))


def tables_of(project: Project, prefixes: Sequence[str] | None = None, up_to: int | None = None) -> dict[str, Path]:
    """Folders of the newest table of each indexed file, by prefix.

    Args:
        project: the database.
        prefixes: of those files. None: all that have one.
        up_to: newest version of the database that tables may be of. None: any.
    """
    found: dict[str, tuple[int, int, Path]] = {}
    for path in sorted((project.folder / "query").glob("*/table.json")):
        manifest = read_table_manifest(path.parent)
        if up_to is not None and manifest.version > up_to:
            continue
        rank = (manifest.version, path.stat().st_mtime_ns, path.parent)
        prefix = manifest.source.prefix
        if (prefixes is None or prefix in prefixes) and rank > found.get(prefix, (-1, -1, Path())):
            found[prefix] = rank
    return {prefix: rank[2] for prefix, rank in found.items()}
