"""The neighbors of one indexed file's chunks: what they follow from, which of them are searched, and their table."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_grit.data.chunks.chunking import document_tokens
from megatron_grit.data.chunks.neighbor_table import (
    NeighborTable,
    TableManifest,
    read_table_manifest,
    write_starts,
    write_table,
)
from megatron_grit.data.chunks.project import Project, fingerprint
from megatron_grit.data.chunks.versions import (
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
from megatron_grit.store.blocks import BlockFolder
from megatron_grit.store.digest import digest_of_settings
from megatron_grit.store.files import replacing, write_json
from megatron_grit.store.logs import get_logger

log = get_logger(__name__)


@dataclass(frozen=True)
class Plan:
    """Which chunks of a file are searched, and which have their neighbors from an earlier table.

    A chunk's position is its number among all chunks of the file.
    """

    starts: np.ndarray
    """int64 [documents + 1], chunks before each document, mapped."""
    blocks: BlockFolder
    """``neighbors`` of the chunks that are searched: those of ``again``, then those from position ``first`` on."""
    table: str | None
    """Folder of the earlier table."""
    first: int
    """Positions that the earlier table has."""
    again: np.ndarray
    """int64, ascending: those of them that are searched all the same."""

    def positions(self, start: int, stop: int) -> np.ndarray:
        """Positions of the chunks that are searched as number ``start`` to ``stop - 1``, ascending."""
        count = len(self.again)
        rest = np.arange(max(start, count), max(stop, count)) - count + self.first
        return np.concatenate([self.again[start:stop], rest])


class QueriedFile:
    """An indexed file whose chunks get neighbors in one version of a database, with its table.

    A table that was made of the first documents of the same file with the same index and settings is taken over; the
    chunks after it are searched, and, where documents were removed from the database since, those chunks that have one
    of them among their neighbors. The others would find what they found: what was removed came after their neighbors.

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
            count = plan.first - len(plan.again)
            log.info(f"{self.prefix}: neighbors of {count:,} chunks are those of an earlier table")
        return plan

    def open(self) -> Plan:
        """What was prepared.

        Raises:
            DataError: it is missing or damaged.
        """
        try:
            taken = json.loads((self.folder / "taken_over.json").read_text(encoding="utf-8"))
            table, first = taken["table"], int(taken["num_places"])
            starts = np.asarray(np.load(self.folder / "starts.npy", mmap_mode="r", allow_pickle=False))
            again = np.load(self.folder / "again.npy", allow_pickle=False)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise DataError(
                f"cannot be read ({error}); delete it and run --tasks query-neighbors", path=self.folder
            ) from None
        signature = self._signature | {"tokens": fingerprint(self.path), "first": first}
        signature["again"] = hashlib.sha256(again.tobytes()).hexdigest()
        count = len(again) + int(starts[-1]) - first
        blocks = BlockFolder(self.folder, count, self.config.block_size, signature, "run --tasks query-neighbors")
        return Plan(starts, blocks, table, first, again)

    def _take_over(self) -> None:
        """Write which table is taken over, and which of its chunks are searched all the same."""
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
                log.warning(f"not taken over: {error}")
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
        )
        write_table(self.folder, self._parts(plan), manifest)

    def _parts(self, plan: Plan) -> Iterator[np.ndarray]:
        """Rows of the table in runs."""
        size, count = self.config.block_size, len(plan.again)
        read = functools.lru_cache(maxsize=1)(lambda number: plan.blocks.read(plan.blocks.blocks[number])["neighbors"])

        def searched(start: int, stop: int) -> np.ndarray:
            parts = [
                read(number)[max(start - number * size, 0) : stop - number * size]
                for number in range(start // size, -(-stop // size))
            ]
            return np.concatenate(parts)

        if plan.table is not None:
            earlier = NeighborTable(self.folder.parent / plan.table, self.db.rows).neighbors
            for start in range(0, plan.first, size):
                part = np.array(earlier[start : min(start + size, plan.first)])
                begin, end = np.searchsorted(plan.again, [start, start + len(part)]).tolist()
                if begin < end:
                    part[plan.again[begin:end] - start] = searched(begin, end)
                yield part
        for start in range(count, plan.blocks.num_items, size):
            yield searched(start, min(start + size, plan.blocks.num_items))


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
