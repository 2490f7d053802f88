"""The neighbors of one indexed file's chunks: what they follow from, which of them are searched, and their table."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_grit.data.chunks.chunking import document_tokens, read_windows
from megatron_grit.data.chunks.neighbor_table import (
    COLUMNS,
    NeighborTable,
    TableManifest,
    read_table_manifest,
    write_starts,
    write_table,
)
from megatron_grit.data.chunks.project import Project, fingerprint
from megatron_grit.data.chunks.versions import (
    Version,
    VersionedDb,
    begins_with,
    is_among,
    read_version,
    removed_documents,
    sorted_keys,
    source_of,
)
from megatron_grit.errors import DataError
from megatron_grit.retrieval.database.versions import search_of
from megatron_grit.retrieval.work import Worker
from megatron_grit.store.blocks import Arrays, BlockFolder
from megatron_grit.store.digest import digest_of_rows, digest_of_settings
from megatron_grit.store.files import replacing
from megatron_grit.store.logs import get_logger
from megatron_grit.store.rows import read_rows
from megatron_grit.store.sealed import read_sealed, write_sealed

log = get_logger(__name__)


@dataclass(frozen=True)
class Plan:
    """Which chunks of a file are searched, in what, and which have their neighbors from an earlier table.

    A chunk's position is its number among all chunks of the file.
    """

    starts: np.ndarray
    """int64 [documents + 1], chunks before each document, mapped."""
    blocks: BlockFolder
    """:data:`~megatron_grit.data.chunks.neighbor_table.COLUMNS` of the chunks that are searched in the whole database:
    those of ``again``, then those from position ``first`` on."""
    updates: BlockFolder
    """The same of the positions before ``first``, after a search of what came to the database since the earlier table;
    none where nothing came. Rows of ``again`` are as they were."""
    table: str | None
    """Folder of the earlier table."""
    first: int
    """Positions that the earlier table has."""
    num_segments: int
    """Segments of the database that the earlier table was searched in."""
    again: np.ndarray
    """int64, ascending: those of them that are searched all the same."""

    def positions(self, start: int, stop: int) -> np.ndarray:
        """Positions of the chunks that are searched as number ``start`` to ``stop - 1``, ascending."""
        count = len(self.again)
        rest = np.arange(max(start, count), max(stop, count)) - count + self.first
        return np.concatenate([self.again[start:stop], rest])


@dataclass(frozen=True)
class _Earlier:
    """A table to go on from."""

    table: NeighborTable
    num_segments: int
    removed: np.ndarray
    """Keys of the documents that were removed since, ascending."""


class QueriedFile:
    """An indexed file whose chunks get neighbors in one version of a database, with its table.

    A table that was made of the first documents of the same file with the same index and settings is taken over. Chunks
    after it are searched. Of the others, what came to the database since is searched, and merged with what they had:
    the nearest of both are the nearest of all. Where documents were removed, chunks that have one of them among their
    neighbors are searched again; the others would find what they found, since what was removed came after their
    neighbors. And where something came, so are those that had fewer neighbors than are kept: their search may have
    ended at its limit.

    Args:
        project: the database.
        db: one version of its chunks.
        prefix: of the documents.
        worker: this process; all of them make one together.

    Attributes:
        folder: of the blocks and the table, named by all that they follow from.
    """

    def __init__(self, project: Project, db: VersionedDb, prefix: str, worker: Worker) -> None:
        self.project, self.db, self.prefix = project, db, prefix
        self.config = config = project.config
        self.path = project.resolve(prefix)
        self.file = project.open(prefix)
        self.datasets = worker.from_first(lambda: db.dataset_numbers(self.path))
        version = db.version
        self.search = search_of(project, version)
        self._signature = {
            "task": "neighbors",
            "chunk_length": config.chunk_length,
            "tokenizer": project.tokenizer.fingerprint,
            "trained": version.trained.sha256,
            "index": [file.sha256 for file in version.segments[0].index],
            "datasets": self.datasets,
            "embedder": version.embedder,
            "nprobe": self.search.nprobe,
            "ef_search": self.search.ef_search,
            "num_neighbors": [config.num_neighbors_query, config.num_neighbors_save],
            "max_overlap": config.max_overlap,
            "query_instruction": config.query_instruction,
            **_state_of(version),
        }
        self.settings = digest_of_settings(self._signature)
        name = digest_of_settings({"settings": self.settings, "tokens": fingerprint(self.path)})
        self.folder = project.folder / "query" / f"{self.path.name}_{name[:16]}"

    def is_done(self, worker: Worker) -> bool:
        """Whether the table is there and whole; the first process looks. All processes call it."""
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
        table = NeighborTable(self.folder)
        found, config = table.manifest, self.config
        wanted = (self.settings, self.datasets, config.chunk_length, config.num_neighbors_save, int(table.starts[-1]))
        if (found.settings, found.datasets, found.chunk_length, found.num_neighbors, found.num_places) != wanted:
            raise DataError("is not of the settings of its folder; run --tasks query-neighbors again", path=self.folder)

    def prepare(self, worker: Worker) -> Plan:
        """Count the chunks and look for a table to take over. All processes call it."""
        if worker.is_first:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "table.json").unlink(missing_ok=True)  # of a table that is damaged
            eod = self.project.tokenizer.eos_id
            write_starts(self.folder / "starts.npy", self.file, self.config.chunk_length, eod)
            self._take_over()
        worker.barrier()
        plan = self.open()
        if worker.is_first and plan.first:
            new = self._num_chunks_since(plan.num_segments)
            what = f"are searched in {new:,} chunks that came since" if plan.updates.blocks else "have their neighbors"
            count = plan.first - len(plan.again)
            log.info(
                f"{self.prefix}: {count:,} chunks of an earlier table {what}, {plan.blocks.num_items:,} are searched "
                f"in all {len(self.db):,}"
            )
        return plan

    def open(self) -> Plan:
        """What was prepared.

        Raises:
            DataError: it is missing or damaged.
        """
        try:
            taken = read_sealed(self.folder / "taken_over.json")
            table, first, num_segments = taken["table"], int(taken["num_places"]), int(taken["num_segments"])
            starts = read_rows(self.folder / "starts.npy", np.int64, mapped=True)
            again = read_rows(self.folder / "again.npy", np.int64)
            # Sizes of what follows: a damaged one would have no end of blocks. Earlier releases did not note it.
            if taken.get("starts", digest_of_rows(starts)) != digest_of_rows(starts):
                raise ValueError("starts.npy does not match its checksum")
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise DataError(
                f"cannot be read ({error}); delete it and run --tasks query-neighbors", path=self.folder
            ) from None
        signature = self._signature | {"tokens": fingerprint(self.path), "first": first}
        signature["again"] = hashlib.sha256(again.tobytes()).hexdigest()
        count, remedy = len(again) + int(starts[-1]) - first, "run --tasks query-neighbors"
        blocks = BlockFolder(self.folder, count, self.config.block_size, signature, remedy)
        signature |= {"table": taken.get("sha256"), "num_segments": num_segments}
        num_old = first if self._num_chunks_since(num_segments) else 0
        updates = BlockFolder(self.folder / "updates", num_old, self.config.block_size, signature, remedy)
        return Plan(starts, blocks, updates, table, first, num_segments, again)

    def _num_chunks_since(self, num_segments: int) -> int:
        """Chunks of the segments after the first ``num_segments``."""
        return sum(segment.num_chunks for segment in self.db.version.segments[num_segments:])

    def _take_over(self) -> None:
        """Write which table is taken over, and which of its chunks are searched all the same."""
        earlier, again = self._earlier_table(), [np.empty(0, dtype=np.int64)]
        taken: dict[str, Any] = {"table": None, "num_places": 0, "num_segments": 0}
        if earlier is not None:
            manifest, neighbors = earlier.table.manifest, earlier.table.neighbors
            chunks = self.db.chunks_of(earlier.removed)
            has_more = self._num_chunks_since(earlier.num_segments) > 0
            for start in range(0, len(neighbors) if len(chunks) or has_more else 0, self.config.block_size):
                part = neighbors[start : start + self.config.block_size]
                lost = is_among(part, chunks).any(axis=1)
                again.append(np.flatnonzero(lost | (part[:, -1] < 0) if has_more else lost) + start)
            taken = {"table": earlier.table.folder.name, "sha256": manifest.sha256}
            taken |= {"num_places": manifest.num_places, "num_segments": earlier.num_segments}
        with replacing(self.folder / "again.npy", "wb") as file:
            np.save(file, np.concatenate(again), allow_pickle=False)
        starts = digest_of_rows(read_rows(self.folder / "starts.npy", np.int64, mapped=True))
        write_sealed(self.folder / "taken_over.json", taken | {"starts": starts})

    def _earlier_table(self) -> _Earlier | None:
        """The table of the first documents of this file with this index and these settings from which least is to be
        searched: by the number of chunks that queries are compared with, then by the documents removed since."""
        best: tuple[tuple[int, int], _Earlier] | None = None
        num_places = int(read_rows(self.folder / "starts.npy", np.int64, mapped=True)[-1])
        for path in sorted(self.folder.parent.glob("*/table.json")):
            try:
                manifest = read_table_manifest(path.parent)
                since = self._since(manifest)
                if since is None or not begins_with(self.path, manifest.source):
                    continue
                num_segments, removed = since
                num_new = self._num_chunks_since(num_segments)
                searched = (num_places - manifest.num_places) * len(self.db) + manifest.num_places * num_new
                rank = searched, len(removed)
                if best is None or rank < best[0]:
                    best = rank, _Earlier(NeighborTable(path.parent), num_segments, removed)
            except DataError as error:
                log.warning(f"not taken over: {error}")
        return best[1] if best else None

    def _since(self, manifest: TableManifest) -> tuple[int, np.ndarray] | None:
        """Segments of the database that a table was searched in, and keys of the documents that were removed after it
        was made, ascending; None where anything else that rows follow from differs."""
        version, folder = self.db.version, self.project.folder
        if not manifest.scores_sha256:
            return None  # of an older kind, which nothing can be merged with
        if manifest.settings == self.settings:
            return len(version.segments), np.empty(0, dtype=np.uint64)
        earlier = read_version(folder, manifest.version)
        if digest_of_settings(self._signature | _state_of(earlier)) != manifest.settings:
            return None
        tables = [[segment.table.sha256 for segment in each.segments] for each in (earlier, version)]
        removed = sorted_keys(removed_documents(folder, earlier))
        # A version that is pinned may have fewer: what the table left out would have to come in again.
        if tables[0] != tables[1][: len(tables[0])] or not is_among(removed, self.db.tombstones).all():
            return None
        return len(tables[0]), np.setdiff1d(self.db.tombstones, removed)

    def windows(self, documents: np.ndarray, begins: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """As :func:`read_windows`."""
        return read_windows(self.file, documents, begins, count, self.project.tokenizer.eos_id)

    def tokens(self, document: int, begin: int, count: int) -> np.ndarray:
        """Tokens of a document from one on, without its end-of-document token; fewer at its end."""
        return document_tokens(self.file, document, begin, count, self.project.tokenizer.eos_id)

    def write(self, plan: Plan) -> None:
        """Join what was taken over and the blocks into the table that training reads. In one process."""
        version = self.db.version
        manifest = TableManifest(
            source=source_of(self.prefix, self.path),
            datasets=self.datasets,
            settings=self.settings,
            chunk_length=self.config.chunk_length,
            num_neighbors=self.config.num_neighbors_save,
            num_places=int(plan.starts[-1]),
            version=version.number,
            database=version.chunks,
            embedder=version.embedder,
            nprobe=self.search.nprobe,
            ef_search=self.search.ef_search,
            recall=self.search.recall,
            num_taken_over=plan.first - len(plan.again),
            num_copies=self._num_copies(plan),
        )
        write_table(self.folder, self._parts(plan), manifest)
        log.info(f"{self.prefix}: neighbors for {manifest.num_places:,} chunks{what_filters_left(manifest)}")

    def _num_copies(self, plan: Plan) -> int | None:
        """Those that the searches left out, of the earlier table as well; None where it does not say."""
        before = 0 if plan.table is None else read_table_manifest(self.folder.parent / plan.table).num_copies
        if before is None:
            return None
        found = (
            int(folder.read(block, "num_copies")["num_copies"][0])
            for folder in (plan.blocks, plan.updates)
            for block in folder.blocks
        )
        return before + sum(found)

    def earlier_rows(self, plan: Plan, start: int, stop: int) -> Arrays:
        """Rows of the table that is taken over, by position."""
        assert plan.table is not None
        table = NeighborTable(self.folder.parent / plan.table)
        return {name: np.array(getattr(table, name)[start:stop]) for name in COLUMNS}

    def _parts(self, plan: Plan) -> Iterator[Arrays]:
        """Rows of the table in runs."""
        size, count = self.config.block_size, len(plan.again)
        read = functools.lru_cache(maxsize=1)(lambda number: plan.blocks.read(plan.blocks.blocks[number]))

        def searched(start: int, stop: int) -> Arrays:
            numbers = range(start // size, -(-stop // size))
            parts = [(read(number), slice(max(start - number * size, 0), stop - number * size)) for number in numbers]
            return {name: np.concatenate([part[name][rows] for part, rows in parts]) for name in COLUMNS}

        for number, start in enumerate(range(0, plan.first, size)):
            stop = min(start + size, plan.first)
            updates = plan.updates
            part = updates.read(updates.blocks[number]) if updates.blocks else self.earlier_rows(plan, start, stop)
            begin, end = np.searchsorted(plan.again, [start, stop]).tolist()
            if begin < end:
                for name, rows in searched(begin, end).items():
                    part[name][plan.again[begin:end] - start] = rows
            yield part
        for start in range(count, plan.blocks.num_items, size):
            yield searched(start, min(start + size, plan.blocks.num_items))


def _state_of(version: Version) -> dict[str, Any]:
    """What of a version changes as it grows and shrinks, and rows of a table follow from. Not the files of what was
    added: they follow from the chunks, and may be joined."""
    removed = version.tombstones.sha256 if version.tombstones else None
    return {"chunks": version.chunks, "tombstones": removed}


def what_filters_left(manifest: TableManifest) -> str:
    """How many rows of a table have fewer neighbors than wanted, and how many copies were left out, to read."""
    copies = f"; {manifest.num_copies:,} copies were left out" if manifest.num_copies else ""
    if not manifest.num_short:
        return copies
    few = f"; {manifest.num_short:,} have fewer than {manifest.num_neighbors}, {manifest.num_none:,} of them none"
    return few + copies


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
