"""Neighbors of the chunks of rows, from one version of a retrieval database.

A chunk of a row is one of its document in the database: the first of a segment is cut off in front where the segment
begins inside it. It has neighbors if it ends where the document's chunk does; those of a chunk that the segment's end
cuts off were found with tokens that the row does not hold.

Shape suffix legend: C = chunks of a row, k = neighbors of a chunk, R = tokens of a neighbor.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from megatron_grit.config.database.schema import CONFIG_FILE, load_project_config
from megatron_grit.config.schema import RunConfig
from megatron_grit.config.shape import neighbor_tokens
from megatron_grit.data.chunks.chunk_db import read_texts
from megatron_grit.data.chunks.neighbor_table import NONE, NeighborTable, TableManifest, read_table_manifest
from megatron_grit.data.chunks.project import Project
from megatron_grit.data.chunks.sample_documents import SampleDocuments
from megatron_grit.data.chunks.versions import VersionedDb, document_keys, read_version
from megatron_grit.data.order.permutation import derive_keys, permute
from megatron_grit.data.order.sources import Sources
from megatron_grit.data.rows.neighbors import Neighbors, chunk_row
from megatron_grit.data.rows.segments import Segment
from megatron_grit.errors import ConfigError, DataError

_BEYOND = np.iinfo(np.int64).max
"""Where a segment ends that holds the end of its document: its last chunk is whole, however short."""
_QUERY = "tools/retro/build_db.py --tasks query-neighbors"


class NeighborReader:
    """Reads what the chunks of rows read.

    Args:
        config: the run, with ``model.retro.num_neighbors`` above 0.
        sources: of the rows; each has a neighbor table of the version.
        version: of the database. None: the newest.

    Raises:
        ConfigError: no database, or one of other chunks or with fewer neighbors.
        DataError: a table that is missing, damaged, or of another version or file.
    """

    def __init__(self, config: RunConfig, sources: Sources, version: int | None = None) -> None:
        retro, folder = config.model.retro, config.data.retro_project
        settings = None if folder is None else load_project_config(Path(folder))
        if folder is None or settings is None:
            raise ConfigError(
                f"model.retro.num_neighbors is {retro.num_neighbors}, but data.retro_project {folder} holds no "
                f"{CONFIG_FILE}; give the --project-dir of tools/retro/build_db.py"
            )
        if settings.chunk_length != retro.chunk_length:
            raise ConfigError(
                f"model.retro.chunk_length {retro.chunk_length} is not that of data.retro_project {folder}, "
                f"{settings.chunk_length}; leave it out, or build a database with --chunk_length {retro.chunk_length}"
            )
        project = Project(Path(folder), settings)
        self._k, self._chunk_length, self._num_tokens = (
            retro.num_neighbors,
            retro.chunk_length,
            neighbor_tokens(config.model),
        )
        self._share = retro.encoder_conditioning == "none"
        self._shuffle = derive_keys(config.training.seed) if config.data.retro_shuffle else None
        self._db = VersionedDb(project, read_version(project.folder, version))
        folders = [path.parent for path in sorted((project.folder / "query").glob("*/table.json"))]
        manifests = [(folder, read_table_manifest(folder)) for folder in folders]
        self.tables = [self._table(project, manifests, Path(name)) for name in sources.names]
        """The neighbor table of each source."""
        self._datasets = [table.manifest.datasets for table in self.tables]
        self._sources = sources

    def _table(self, project: Project, manifests: Sequence[tuple[Path, TableManifest]], prefix: Path) -> NeighborTable:
        number = self._db.version.number
        others = set()
        for folder, manifest in manifests:
            if project.resolve(manifest.source.prefix).resolve() != prefix.resolve():
                continue
            if manifest.version != number:
                others.add(manifest.version)
                continue
            if manifest.num_neighbors < self._k:
                raise ConfigError(
                    f"model.retro.num_neighbors {self._k} is above the {manifest.num_neighbors} that {folder} "
                    f"has for each chunk; lower it, or run {_QUERY} with --num_neighbors_save {self._k} or more"
                )
            if manifest.chunk_length != self._chunk_length:
                raise DataError(
                    f"is of chunks of {manifest.chunk_length} tokens, and config.json of the database says "
                    f"{self._chunk_length}; put config.json back from a copy, or build another database",
                    path=folder / "table.json",
                )
            table = NeighborTable(folder, self._db.rows, self._db.version.chunks)
            table.check_source(prefix)
            return table
        known = f"; there are those of version {sorted(others)}: see data.retro_version" if others else ""
        queried = project.config.query_paths or project.config.data_paths
        is_queried = prefix.resolve() in [project.resolve(each).resolve() for each in queried]
        remedy = "" if is_queried else "add it to its query_paths and "
        raise DataError(
            f"has no neighbors in version {number} of {project.folder}; {remedy}run {_QUERY}{known}", path=prefix
        )

    @property
    def version(self) -> int:
        """Number of the version."""
        return self._db.version.number

    def identity(self) -> str:
        """Of the version's chunks and of the tables: what is read for a row is the same while it is."""
        shuffled = [] if self._shuffle is None else [f"shuffled {self._shuffle}"]
        return ":".join([self._db.version.chunks, *(table.manifest.sha256 for table in self.tables), *shuffled])

    def read(self, rows: Sequence[Sequence[Segment]]) -> list[Neighbors]:
        """What rows of some segments read.

        Neighbors from a document that the row holds are left out. Several rows are read at once, which costs little
        more than one.

        Raises:
            DataError: a damaged file.
        """
        numbers = [(n, s.source, s.record, s.start, s.stop, s.length) for n, row in enumerate(rows) for s in row]
        row_S, source_S, record_S, start_S, stop_S, length_S = np.array(numbers, dtype=np.int64).reshape(-1, 6).T
        length, bounds = self._chunk_length, np.concatenate(([0], np.cumsum(length_S)))
        bounds_C2, ends_C = chunk_row(bounds, length - start_S % length, length)
        segment_C = np.searchsorted(bounds, bounds_C2[:, 0], side="right") - 1
        chunk_C = (bounds_C2[:, 0] + (start_S - bounds[:-1])[segment_C]) // length
        ids_Ck = np.full((len(bounds_C2), self._k), NONE, dtype=np.int64)
        sources_Ck3 = np.zeros((*ids_Ck.shape, 3), dtype=np.uint32)
        documents, row_C = self._documents(numbers), row_S[segment_C]
        for source in set(source_S.tolist()):
            table, of_source = self.tables[source], source_S == source
            _, lengths = self._sources[source].file.extents(record_S[of_source])
            last_S = np.zeros_like(stop_S)  # first token after the whole chunks
            last_S[of_source] = np.where(stop_S[of_source] == lengths, _BEYOND, stop_S[of_source])
            chosen = np.flatnonzero((chunk_C + 1) * length <= last_S[segment_C])
            records = record_S[segment_C[chosen]]
            places, stops = table.starts[records] + chunk_C[chosen], table.starts[records + 1]
            chosen, places = chosen[places < stops], places[places < stops]
            if self._shuffle is not None:
                places = permute(places, table.manifest.num_places, self._shuffle)
            ids_Ck[chosen], sources_Ck3[chosen] = table.nearest(places, row_C[chosen], documents, self._k)
        text_of_Ck, texts = self._unique(ids_Ck, row_C)
        tokens, lengths_U = read_texts(self._db.project, sources_Ck3[ids_Ck >= 0][texts], self._num_tokens)
        tokens_N, ends_N = tokens.astype(np.int64), np.concatenate(([0], np.cumsum(lengths_U)))
        found, first_C, first_U = [], 0, 0
        begins = bounds[np.searchsorted(row_S, np.arange(len(rows)))].tolist()
        edges = np.searchsorted(row_C, np.arange(1, len(rows) + 1)).tolist()
        for begin, last_C in zip(begins, edges, strict=True):
            of_row = text_of_Ck[first_C:last_C]
            last_U = max(int(of_row.max(initial=NONE)) + 1, first_U)
            found.append(
                Neighbors(
                    chunk_bounds_C2=bounds_C2[first_C:last_C] - begin,
                    segment_ends_C=ends_C[first_C:last_C] - begin,
                    text_of_Ck=np.where(of_row >= 0, of_row - first_U, NONE),
                    lengths_U=lengths_U[first_U:last_U],
                    tokens_1N=torch.from_numpy(tokens_N[ends_N[first_U] : ends_N[last_U]])[None],
                )
            )
            first_C, first_U = last_C, last_U
        return found

    def _documents(self, segments: Sequence[tuple[int, ...]]) -> SampleDocuments:
        """Those of segments (row, source, record, ...), as the database numbers them."""
        held = [(row, dataset, record) for row, source, record, *_ in segments for dataset in self._datasets[source]]
        rows, datasets, records = np.array(held, dtype=np.int64).reshape(-1, 3).T
        return SampleDocuments(rows, document_keys(datasets, records))

    def _unique(self, ids_Ck: np.ndarray, row_C: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which text each neighbor is, and which of the neighbors, in their order, each text is taken from; one that a
        row reads again is kept once only where the encoder does not look at the chunk that reads it."""
        there = ids_Ck >= 0
        text_of_Ck = np.full(ids_Ck.shape, NONE, dtype=np.int64)
        texts = np.arange(np.count_nonzero(there))
        text_of_Ck[there] = texts
        if self._share:
            of_row = (ids_Ck + row_C[:, None] * len(self._db))[there]
            _, texts, text_of_Ck[there] = np.unique(of_row, return_index=True, return_inverse=True)
        return text_of_Ck, texts
