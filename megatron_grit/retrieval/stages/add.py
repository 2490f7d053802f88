"""The task add: chunks of new documents get ids after those that are there, and codes in an index file of their own.

Chunks are cut, compared, embedded and encoded by the same functions as in a first build. What differs: earlier chunks
take part in the search for duplicates, and the index is not trained again.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import asdict, replace

import numpy as np

from megatron_grit.data.chunks.chunk_db import ChunkDb
from megatron_grit.data.chunks.project import Project
from megatron_grit.data.chunks.versions import (
    AddedChunks,
    Source,
    StoredFile,
    TableDb,
    Version,
    VersionedDb,
    begins_with,
    check_stored,
    infos_of,
    read_version,
    source_of,
    stored_file,
    version_numbers,
)
from megatron_grit.errors import ConfigError, DataError
from megatron_grit.inference.encoders.protocol import Embedder
from megatron_grit.retrieval.database.cuts import (
    chunk_blocks,
    clear_duplicates,
    cut_chunks,
    cuts_of,
    find_duplicates,
    parted,
    writing_table,
)
from megatron_grit.retrieval.database.index_files import fill, num_added
from megatron_grit.retrieval.database.vectors import ChunkVectors, embed_chunks
from megatron_grit.retrieval.database.versions import added_vectors, next_version, version_to_use
from megatron_grit.retrieval.index.faiss_index import VectorIndex
from megatron_grit.retrieval.index.manifest import read_manifest
from megatron_grit.retrieval.stages.db_build import check_documents
from megatron_grit.retrieval.stages.task import Inputs, Job, Report, Task
from megatron_grit.retrieval.stages.tombstone import earlier_chunks
from megatron_grit.retrieval.work import Check, Worker, compute_blocks
from megatron_grit.store.blocks import Arrays, Block, BlockFolder
from megatron_grit.store.digest import digest_of_settings
from megatron_grit.store.logs import get_logger

log = get_logger(__name__)


class Add(Task):
    """Adds documents appended to a dataset, and datasets appended to the list, without training the index again."""

    name = "add"

    def check(self, inputs: Inputs) -> Iterator[str]:
        """As :class:`Task` says: the documents are there, once each."""
        return check_documents(inputs)

    def run(self, job: Job) -> None:
        add_documents(job.project, job.worker, job.embedder)

    def validate(self, job: Job) -> Iterator[Check]:
        """As :class:`Task` says: what each version added that added documents."""
        folder = job.project.folder
        versions = [read_version(folder, number) for number in version_numbers(folder)]
        for before, version in itertools.pairwise(versions):
            if len(version.segments) <= len(before.segments):
                continue
            addition = Addition(job.project, before, job.embedder, version.sources)
            for check in chunk_blocks(job.project, addition.cuts):
                yield check._replace(what=f"{check.what}, version {version.number}")
            if job.worker.is_first:
                segment = version.segments[-1]
                for file in (segment.table, *segment.index):
                    check_stored(folder, file, thorough=True)
            job.worker.barrier()
            vectors = addition.vectors()
            vectors.look(job.worker)
            if vectors.stored:
                yield Check(f"embeddings of version {version.number}", vectors.blocks, vectors.compute)
            yield addition.code_blocks(vectors)._replace(what=f"codes of version {version.number}")

    def describe(self, db: ChunkDb, version: Version | None, *, verify: bool) -> Report:
        """As :class:`Task` says: the versions, and what each of them changed."""
        folder = db.project.folder
        versions = [read_version(folder, number) for number in version_numbers(folder)]
        return {"versions": [{"number": v.number, "num_chunks": v.num_chunks, "notes": v.notes} for v in versions]}


def add_documents(project: Project, worker: Worker, embedder: Embedder) -> None:
    """Add what is new in the datasets of the configuration. All processes call it.

    Raises:
        ConfigError: a pinned version; new documents go to the newest.
        DataError: the documents that are there already were changed.
    """
    if project.config.version is not None:
        raise ConfigError(f"version is {project.config.version}; documents are added to the newest: set it to null")
    before = version_to_use(project, worker, embedder)
    addition = Addition(project, before, embedder)
    if not any(cut.blocks.num_items for cut in addition.cuts):
        log.info(f"no documents are new since version {before.number}")
        return
    cut_chunks(project, addition.cuts, worker)
    addition.leave_out(worker)
    codes = addition.encode(worker)
    if worker.is_first:
        addition.finish(codes)
    worker.barrier()


class Addition:
    """What comes to a version to make the next one.

    Args:
        project: the database.
        before: its newest version.
        embedder: that of its index. None: no codes are made.
        sources: of the version that it made. None: the files as they are now.

    Attributes:
        cuts: the new documents of each dataset, and their chunks.
        chunks: fingerprint of all chunks with the new ones.

    Raises:
        DataError: documents of the version were changed.
    """

    def __init__(
        self, project: Project, before: Version, embedder: Embedder | None, sources: list[Source] | None = None
    ) -> None:
        self.project, self.before, self.embedder = project, before, embedder
        number = before.number + 1
        folder = project.folder / "db" / "versions" / f"{number:04d}"
        self.folder, self.table = folder, folder / "train.hdf5"
        VersionedDb(project, before)  # its documents are as they were
        paths = project.config.data_paths
        self.sources = sources or [source_of(prefix, project.resolve(prefix)) for prefix in paths]
        for source, earlier in zip(self.sources, before.sources, strict=False):
            path = project.resolve(source.prefix)
            if source.num_documents < earlier.num_documents or not begins_with(path, earlier):
                raise DataError("lacks documents of the database; put the old file back, or tombstone them", path=path)
        old = [source.num_documents for source in before.sources]
        self.cuts = cuts_of(project, infos_of(self.sources), old, folder)
        self.chunks = digest_of_settings({"before": before.chunks, "sources": [asdict(s) for s in self.sources]})
        trained = (project.folder / before.trained.path).parent
        self._added, self._codes = trained / f"added_v{number:04d}.faissindex", trained / f"add_codes_v{number:04d}"

    def leave_out(self, worker: Worker) -> None:
        """Write the table of the new chunks that are in the database neither already nor twice. All processes call it.

        Raises:
            DataError: chunks of the database are missing, without which duplicates are not found.
        """
        earlier = [] if self.project.config.duplicates == "keep" else earlier_chunks(self.project, self.before)
        search = find_duplicates(self.project, self.cuts, self.folder, worker, earlier)
        if worker.is_first:
            state = search.state()
            num_rows = sum(len(part.train) for part in parted(self.project, self.cuts, state))
            with writing_table(self.table, num_rows, self.chunks) as table:
                for part in parted(self.project, self.cuts, state):
                    table.add(part.train)
            log.info(
                f"{num_rows:,} chunks are new; {np.count_nonzero(state):,} repeat chunks of the database or each other"
            )
        worker.barrier()

    def encode(self, worker: Worker) -> BlockFolder:
        """Embed the new chunks and make their codes, whose blocks are returned. All processes call it."""
        vectors = self.vectors()
        embed_chunks(vectors, worker)
        what, codes, compute, _ = self.code_blocks(vectors)
        compute_blocks(codes, compute, worker, what)
        return codes

    def vectors(self) -> ChunkVectors:
        """Those of the new chunks. They stay on disk: whoever searches with these chunks, or mines among them, does not
        embed them again.

        Raises:
            DataError: the table of the new chunks is missing.
        """
        new = TableDb(self.project, self.table, infos_of(self.sources))
        folder = added_vectors(self.project.folder, self.before.number + 1)
        assert self.embedder is not None
        return ChunkVectors(self.project, new, self.embedder, self.chunks, folder)

    def code_blocks(self, vectors: ChunkVectors) -> Check:
        """The blocks of the new chunks' codes, and what makes one.

        Args:
            vectors: of the chunks.

        Raises:
            DataError: the trained index is missing or of another embedder.
        """
        before, config = self.before, self.project.config
        trained = VectorIndex.load(check_stored(self.project.folder, before.trained), embedder=before.embedder)

        def compute(block: Block) -> Arrays:
            return {"codes": trained.encode(vectors.of_block(block, num_added(config.add_load_fraction, len(block))))}

        signature = {"task": "add_codes", "chunks": self.chunks, "trained": before.trained.sha256}
        settings = {"embedder": before.embedder, "add_load_fraction": config.add_load_fraction}
        settings["dtype"] = vectors.dtype.str
        return Check(
            "codes",
            BlockFolder(self._codes, len(vectors.db), config.block_size, signature | settings, "run --tasks add"),
            compute,
        )

    def fill_index(self, codes: BlockFolder) -> StoredFile:
        """Write the index of the new chunks. In one process.

        Args:
            codes: the blocks of :meth:`code_blocks`, all there.
        """
        folder = self.project.folder
        trained = folder / self.before.trained.path
        index = fill(trained, codes, 0, codes.num_items, self.before.num_chunks)
        manifest = replace(read_manifest(trained), chunks=self.chunks, num_vectors=len(index))
        index.save(self._added, manifest)
        return stored_file(folder, self._added, manifest.sha256)

    def finish(self, codes: BlockFolder) -> None:
        """Fill the index of the new chunks, where there are any, and write the version. In one process."""
        folder = self.project.folder
        index_files = [self.fill_index(codes)] if codes.num_items else []
        segment = AddedChunks(table=stored_file(folder, self.table), num_chunks=codes.num_items, index=index_files)
        counts = [(cut.blocks.num_items, cut.dataset.prefix) for cut in self.cuts if cut.blocks.num_items]
        note = "added " + ", ".join(f"{count} documents of {prefix}" for count, prefix in counts)
        note += "" if index_files else ", whose chunks were all there"
        clear_duplicates(self.folder)
        segments = [*self.before.segments, segment]
        version = next_version(folder, self.before, note, sources=self.sources, segments=segments, chunks=self.chunks)
        if not self.project.config.keep_embeddings:
            codes.remove()
        log.info(f"version {version.number} of the database: {version.num_chunks:,} chunks; {note}")
