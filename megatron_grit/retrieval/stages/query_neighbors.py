"""The task query-neighbors: neighbors of every chunk of the documents that are trained on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass

import numpy as np

from megatron_grit.data.chunks.chunk_db import ChunkDb
from megatron_grit.data.chunks.neighbor_table import NeighborTable, read_table_manifest
from megatron_grit.data.chunks.project import Project
from megatron_grit.data.chunks.versions import Version, VersionedDb, document_keys, is_among
from megatron_grit.inference.encoders.protocol import Embedder
from megatron_grit.retrieval.database.queried import Plan, QueriedFile
from megatron_grit.retrieval.database.vectors import ChunkVectors
from megatron_grit.retrieval.database.versions import open_index, stored_vectors, version_to_use
from megatron_grit.retrieval.index.faiss_index import gpus_of_process
from megatron_grit.retrieval.index.overlap import Runs, shared_runs
from megatron_grit.retrieval.index.search import SearchableIndex, find_allowed
from megatron_grit.retrieval.stages.task import Inputs, Job, Report, Task
from megatron_grit.retrieval.work import Check, Worker, compute_blocks
from megatron_grit.store.blocks import Arrays, Block

_AT_A_TIME = 4096
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
        vectors = stored_vectors(db, worker, job.embedder)
        for prefix in queried_paths(project, version):
            file = QueriedFile(project, db, prefix, worker)
            if worker.is_first:
                file.check()
            worker.barrier()
            yield search_blocks(Searcher(file, file.open(), index, job.embedder, vectors))

    def describe(self, db: ChunkDb, version: Version | None, *, verify: bool) -> Report:
        """As :class:`Task` says: the tables."""
        names = "prefix version num_places num_neighbors num_taken_over nprobe ef_search recall".split()
        tables = []
        for path in sorted(db.project.folder.glob("query/*/table.json")):
            manifest = read_table_manifest(path.parent)
            table = NeighborTable(path.parent, db.rows)
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
    index, vectors = index_to_search(project, version, worker), stored_vectors(db, worker, embedder)
    for file in files:
        plan = file.prepare(worker)
        what, blocks, compute, during = search_blocks(Searcher(file, plan, index, embedder, vectors))
        compute_blocks(blocks, compute, worker, what, during=during)
        if worker.is_first:
            file.write(plan)
        worker.barrier()


def index_to_search(project: Project, version: Version, worker: Worker) -> SearchableIndex | None:
    """The index of a version if this process searches it. None: another process of its model-parallel group searches it
    alone. All processes call it."""
    if worker.leads or project.config.index_placement == "spread":
        return open_index(project, version, worker)
    return None


def search_blocks(searcher: Searcher) -> Check:
    """The blocks of a file's neighbors, and what makes one."""
    during = nullcontext() if searcher.index is None else searcher.index.serving()
    return Check(f"neighbors for {searcher.file.prefix}", searcher.plan.blocks, searcher.compute, during)


@dataclass(frozen=True)
class Searcher:
    """Searches the neighbors of a file's chunks."""

    file: QueriedFile
    plan: Plan
    index: SearchableIndex | None
    """None: this process embeds together with others, one of which searches."""
    embedder: Embedder
    vectors: ChunkVectors | None
    """Of the database's chunks, where they are stored."""

    def compute(self, block: Block) -> Arrays:
        """Neighbors of a block of the chunks that are searched: int64 [n, num_neighbors_save]."""
        parts = [
            self._compute(self.plan.positions(start, min(start + _AT_A_TIME, block.stop)))
            for start in range(block.start, block.stop, _AT_A_TIME)
        ]
        return {"neighbors": np.concatenate(parts)}

    def _compute(self, positions: np.ndarray) -> np.ndarray:
        documents, offsets, tokens = self._chunks(positions)
        decode = self.file.project.tokenizer.decode
        texts = [decode(ids.tolist()) for ids in tokens]
        asked = np.flatnonzero([bool(text.strip()) for text in texts])
        out = np.full((len(positions), self.file.config.num_neighbors_save), -1, dtype=np.int64)
        if not len(asked):
            return out
        texts, documents, offsets = [texts[number] for number in asked], documents[asked], offsets[asked]
        if self.vectors is None or not self.file.datasets:
            vectors = self.embedder.embed(texts, "query")
        else:
            vectors = self.vectors.of_queries(self.file.datasets[0], documents, offsets, texts)
        if self.index is None:
            return out

        def allowed(rows: np.ndarray, ids: np.ndarray) -> np.ndarray:
            keys = self.file.db.keys(ids)
            keep = (ids >= 0) & ~is_among(keys, self.file.db.tombstones)
            for dataset in self.file.datasets:
                own = document_keys(np.full(len(rows), dataset), documents[rows])
                keep &= keys != own[:, None]
            if self.file.config.max_overlap is not None:
                self._drop_overlapping(documents[rows], offsets[rows], ids, keep)
            return keep

        config = self.file.config
        _, out[asked] = find_allowed(
            self.index, vectors, config.num_neighbors_query, config.num_neighbors_save, allowed
        )
        return out

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

    def _drop_overlapping(self, documents: np.ndarray, offsets: np.ndarray, ids: np.ndarray, keep: np.ndarray) -> None:
        """Clear ``keep`` where a neighbor and its continuation repeat the query's chunk or the one after it. Neighbors
        are read until enough of them are left."""
        assert self.file.config.max_overlap is not None
        span, wanted = 2 * self.file.config.chunk_length, self.file.config.num_neighbors_save
        seen: dict[int, Runs] = {}
        for query, (document, offset) in enumerate(zip(documents.tolist(), offsets.tolist(), strict=True)):
            own = Runs(self.file.tokens(document, offset, span))
            good = 0
            for place in np.flatnonzero(keep[query]).tolist():
                if good == wanted:
                    keep[query, place:] = False
                    break
                neighbor = int(ids[query, place])
                if neighbor not in seen:
                    seen[neighbor] = Runs(self.file.db.tokens(neighbor, num_tokens=span))
                keep[query, place] = shared_runs(seen[neighbor], own) <= self.file.config.max_overlap
                good += int(keep[query, place])
