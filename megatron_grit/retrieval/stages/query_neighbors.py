"""The task query-neighbors: neighbors of every chunk of the documents that are trained on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import cached_property

import numpy as np

from megatron_grit.data.chunks.chunk_db import ChunkDb, sources_of
from megatron_grit.data.chunks.document_ranges import document_ranges
from megatron_grit.data.chunks.neighbor_table import COLUMNS, NeighborTable, read_table_manifest
from megatron_grit.data.chunks.project import Project
from megatron_grit.data.chunks.versions import Version, VersionedDb, document_keys, is_among
from megatron_grit.inference.encoders.protocol import Embedder
from megatron_grit.retrieval.database.queried import Plan, QueriedFile
from megatron_grit.retrieval.database.vectors import SegmentVectors
from megatron_grit.retrieval.database.versions import open_index, version_to_use, version_vectors
from megatron_grit.retrieval.index.faiss_index import gpus_of_process
from megatron_grit.retrieval.index.overlap import Copies, Outlines
from megatron_grit.retrieval.index.search import SearchableIndex, find_allowed
from megatron_grit.retrieval.stages.task import Inputs, Job, Report, Task
from megatron_grit.retrieval.work import Check, Worker, compute_blocks
from megatron_grit.store.blocks import Arrays, Block

AT_A_TIME = 4096
"""Chunks that are searched at a time, which bounds the memory of their candidates."""


class QueryNeighbors(Task):
    """Finds the neighbors of every chunk of ``query_paths``, or of the database."""

    name = "query-neighbors"
    makes = ("query",)
    trace = "query/*/table.json"

    def check(self, inputs: Inputs) -> Iterator[str]:
        """As :class:`Task` says: the files are there, and GPUs where the index is to be on some."""
        if inputs.project.config.index_on_gpu:
            gpus_of_process()
        for prefix in inputs.project.config.query_paths:
            yield inputs.project.outline(prefix)

    def run(self, job: Job) -> None:
        query_neighbors(job.project, job.worker, job.embedder)

    def validate(self, job: Job) -> Iterator[Check]:
        project, worker = job.project, job.worker
        version = version_to_use(project, worker, job.embedder)
        db, index = VersionedDb(project, version), index_to_search(project, version, worker)
        vectors = version_vectors(db, worker, job.embedder)
        for prefix in queried_paths(project, version):
            file = QueriedFile(project, db, prefix, worker)
            if worker.is_first:
                file.check()
            worker.barrier()
            plan = file.open()
            yield search_blocks(Searcher(file, plan, index, job.embedder, vectors))
            if plan.updates.blocks:
                new = index_to_search(project, version, worker, plan.num_segments)
                yield update_blocks(Searcher(file, plan, new, job.embedder, vectors))

    def describe(self, db: ChunkDb, version: Version | None, *, verify: bool) -> Report:
        """As :class:`Task` says: the tables."""
        names = "prefix version num_places num_neighbors num_short num_none num_copies".split()
        names += "num_taken_over nprobe ef_search recall".split()
        tables = []
        for path in sorted(db.project.folder.glob("query/*/table.json")):
            manifest = read_table_manifest(path.parent)
            table = NeighborTable(path.parent)
            if verify:
                table.verify()
            values = asdict(manifest) | {"prefix": manifest.source.prefix}
            tables.append({"folder": path.parent.name} | {name: values[name] for name in names})
        return {"tables": tables}


def queried_paths(project: Project, version: Version) -> list[str]:
    """Prefixes of the files whose chunks get neighbors."""
    return project.config.query_paths or project.config.data_paths[: len(version.sources)]


def query_neighbors(project: Project, worker: Worker, embedder: Embedder) -> None:
    """Search the neighbors that are missing. All processes call it.

    Raises:
        DataError: the index is missing, damaged or of another embedder.
    """
    version = version_to_use(project, worker, embedder)
    db = VersionedDb(project, version)
    files = [QueriedFile(project, db, prefix, worker) for prefix in queried_paths(project, version)]
    files = [file for file in files if not file.is_done(worker)]
    if not files:
        return
    vectors = version_vectors(db, worker, embedder)
    plans = [file.prepare(worker) for file in files]
    index = None
    if any(plan.blocks.blocks for plan in plans):
        index = index_to_search(project, version, worker)
    for file, plan in zip(files, plans, strict=True):
        checks = [search_blocks(Searcher(file, plan, index, embedder, vectors))]
        if plan.updates.blocks:
            new = index_to_search(project, version, worker, plan.num_segments)
            checks.append(update_blocks(Searcher(file, plan, new, embedder, vectors)))
        for what, blocks, compute, during in checks:
            compute_blocks(blocks, compute, worker, what, during=during)
        if worker.is_first:
            file.write(plan)
        worker.barrier()


def index_to_search(
    project: Project, version: Version, worker: Worker, first_segment: int = 0
) -> SearchableIndex | None:
    """The index of a version, or of its segments from one on, if this process searches it. None: another process of its
    model-parallel group searches it alone. All processes call it."""
    if worker.leads or project.config.index_placement == "spread":
        return open_index(project, version, worker, first_segment, population="chunks")
    return None


def search_blocks(searcher: Searcher) -> Check:
    """The blocks of a file's neighbors in the whole database, and what makes one."""
    what = f"neighbors for {searcher.file.prefix}"
    return Check(what, searcher.plan.blocks, searcher.compute, searcher.serving())


def update_blocks(searcher: Searcher) -> Check:
    """The blocks of a file's neighbors after a search of what came to the database, which the searcher's index is of,
    and what makes one."""
    what = f"neighbors for {searcher.file.prefix} in what came"
    return Check(what, searcher.plan.updates, searcher.update, searcher.serving())


@dataclass(frozen=True)
class Searcher:
    """Searches the neighbors of a file's chunks."""

    file: QueriedFile
    plan: Plan
    index: SearchableIndex | None
    """None: this process embeds together with others, one of which searches."""
    embedder: Embedder
    vectors: SegmentVectors
    """Of the database's chunks, where they are stored."""

    def serving(self) -> AbstractContextManager[None]:
        """As of :class:`~megatron_grit.retrieval.index.search.SpreadIndex`."""
        return nullcontext() if self.index is None else self.index.serving()

    def compute(self, block: Block) -> Arrays:
        """Neighbors of a block of the chunks that are searched in the whole database:
        :data:`~megatron_grit.data.chunks.neighbor_table.COLUMNS`; and how many copies were left out, int64 [1]."""
        return self._nearest(self.plan.positions(block.start, block.stop))

    def update(self, block: Block) -> Arrays:
        """Neighbors of a block of the chunks of the earlier table: the nearest of those that it had and of those that
        the index has. Of equal ones the earlier come first, as their ids are smaller."""
        rows = self.file.earlier_rows(self.plan, block.start, block.stop)
        positions = np.setdiff1d(np.arange(block.start, block.stop), self.plan.again, assume_unique=True)
        found, kept = self._nearest(positions, more_lists=False), positions - block.start
        both = {name: np.concatenate([rows[name][kept], found[name]], axis=1) for name in COLUMNS}
        keys = both["scores"] if self.file.db.project.config.metric == "l2" else -both["scores"]
        keys = np.where(both["neighbors"] < 0, np.inf, keys)
        order = np.argsort(keys, axis=1, kind="stable")[:, : found["neighbors"].shape[1]]
        for name, values in both.items():
            places = order if values.ndim == 2 else order[..., None]
            rows[name][kept] = np.take_along_axis(values, places, 1)
        return rows | {"num_copies": found["num_copies"]}

    def _nearest(self, positions: np.ndarray, more_lists: bool = True) -> Arrays:
        shape = len(positions), self.file.config.num_neighbors_save
        ids, scores = np.full(shape, -1, dtype=np.int64), np.zeros(shape, dtype=np.float32)
        num_copies = np.zeros(1, dtype=np.int64)
        for first in range(0, len(positions), AT_A_TIME):
            part = slice(first, first + AT_A_TIME)
            ids[part], scores[part], number = self._search(positions[part], more_lists)
            num_copies += number
        sources = sources_of(self.file.db.rows, ids)
        return {"neighbors": ids, "scores": scores, "sources": sources, "num_copies": num_copies}

    def _search(self, positions: np.ndarray, more_lists: bool) -> tuple[np.ndarray, np.ndarray, int]:
        """Ids and scores, [n, num_neighbors_save], and how many copies were left out."""
        documents, offsets, tokens = self._chunks(positions)
        decode = self.file.project.tokenizer.decode
        texts = [decode(ids.tolist()) for ids in tokens]
        asked = np.flatnonzero([bool(text.strip()) for text in texts])
        shape = len(positions), self.file.config.num_neighbors_save
        out, out_scores = np.full(shape, -1, dtype=np.int64), np.zeros(shape, dtype=np.float32)
        if not len(asked):
            return out, out_scores, 0
        texts, documents, offsets = [texts[number] for number in asked], documents[asked], offsets[asked]
        dataset = self.file.datasets[0] if self.file.datasets else None
        vectors = self.vectors.of_queries(dataset, documents, offsets, texts)
        if self.index is None:
            return out, out_scores, 0
        copies = self._copies(documents, offsets)

        def allowed(rows: np.ndarray, ids: np.ndarray) -> np.ndarray:
            keys = self.file.db.keys(ids)
            keep = (ids >= 0) & ~is_among(keys, self.file.db.tombstones)
            for dataset in self.file.datasets:
                own = document_keys(np.full(len(rows), dataset), documents[rows])
                keep &= keys != own[:, None]
            if copies is not None:
                copies.drop(rows, ids, keep)
            return keep

        config = self.file.config
        scores, ids = find_allowed(
            self.index,
            vectors,
            config.num_neighbors_query,
            config.num_neighbors_save,
            allowed,
            lambda rows: self._own_chunks(documents[rows]),
            more_lists=more_lists,
        )
        out[asked], out_scores[asked] = ids, np.where(ids < 0, 0, scores)
        return out, out_scores, 0 if copies is None else copies.num_dropped

    def _own_chunks(self, documents: np.ndarray) -> np.ndarray:
        """Ranges of ids of the chunks of documents: int64 [n, datasets x tables, 2]."""
        different, of = np.unique(documents, return_inverse=True)
        ranges = [
            document_ranges(self.file.db.tables, document_keys(np.full(len(different), dataset), different))
            for dataset in self.file.datasets
        ]
        return np.concatenate([*ranges, np.empty((len(different), 0, 2), dtype=np.int64)], axis=1)[of]

    def _chunks(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
        """Document, first token and tokens of chunks by their positions, which ascend."""
        length = self.file.config.chunk_length
        documents = np.searchsorted(self.plan.starts, positions, side="right") - 1
        offsets = (positions - self.plan.starts[documents]) * length
        tokens: list[np.ndarray] = []
        # Runs of chunks that follow each other in a document are read at once.
        breaks = (np.diff(documents) != 0) | (np.diff(positions) != 1)
        edges = np.concatenate([[0], np.flatnonzero(breaks) + 1, [len(positions)]])
        for first, last in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
            begin = int(offsets[first])
            span = self.file.tokens(int(documents[first]), begin, int(offsets[last - 1]) + length - begin)
            tokens += [span[offset - begin : offset - begin + length] for offset in offsets[first:last].tolist()]
        return documents, offsets, tokens

    def _copies(self, documents: np.ndarray, offsets: np.ndarray) -> Copies | None:
        """What leaves out copies of chunks and what follows them."""
        config = self.file.config
        if config.max_overlap is None:
            return None
        tokens, lengths = self.file.windows(documents, offsets, 2 * config.chunk_length)
        return Copies(self.outlines, tokens, lengths, config.max_overlap, config.num_neighbors_save)

    @cached_property
    def outlines(self) -> Outlines:
        """Of the database's chunks with what follows them."""

        def read(chunks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            tokens, mask = self.file.db.read_tokens(chunks)
            return tokens, mask.sum(1)

        return Outlines(read, len(self.file.db))
