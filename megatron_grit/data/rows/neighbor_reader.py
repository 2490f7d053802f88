"""Neighbors of the chunks of rows, from one version of a retrieval database.

A chunk of a row is one of its document in the database: the first of a segment is cut off in front where the segment
begins inside it. It has neighbors if it ends where the document's chunk does; those of a chunk that the segment's end
cuts off were found with tokens that the row does not hold.

Shape suffix legend: C = chunks of a row, k = neighbors of a chunk, R = tokens of a neighbor.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from megatron_grit.config.database.schema import CONFIG_FILE, load_project_config
from megatron_grit.config.schema import RunConfig
from megatron_grit.config.shape import neighbor_tokens
from megatron_grit.data.chunks.chunk_db import read_places
from megatron_grit.data.chunks.neighbor_table import NONE, NeighborTable, read_table_manifest
from megatron_grit.data.chunks.project import Project
from megatron_grit.data.chunks.versions import VersionedDb, read_version
from megatron_grit.data.order.sources import Sources
from megatron_grit.data.rows.neighbors import Neighbors, chunk_row
from megatron_grit.data.rows.segments import Segment
from megatron_grit.errors import ConfigError, DataError


class NeighborReader:
    """Reads what the chunks of rows read.

    Args:
        config: the run, with ``model.retro.num_neighbors`` above 0.
        sources: of the rows; each has a neighbor table of the version.

    Raises:
        ConfigError: no database, or one of other chunks or with fewer neighbors.
        DataError: a table that is missing, damaged, or of another version or file.
    """

    def __init__(self, config: RunConfig, sources: Sources) -> None:
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
                f"{settings.chunk_length}"
            )
        project = Project(Path(folder), settings)
        self._k, self._chunk_length, self._num_tokens = (
            retro.num_neighbors,
            retro.chunk_length,
            neighbor_tokens(config.model),
        )
        self._share = retro.encoder_conditioning == "none"
        self._db = VersionedDb(project, read_version(project.folder, config.data.retro_version))
        self._tables = [self._table(project, Path(name)) for name in sources.names]
        self._sources = sources

    def _table(self, project: Project, prefix: Path) -> NeighborTable:
        number = self._db.version.number
        others = set()
        for path in sorted((project.folder / "query").glob("*/table.json")):
            manifest = read_table_manifest(path.parent)
            if project.resolve(manifest.source.prefix).resolve() != prefix.resolve():
                continue
            if manifest.version != number:
                others.add(manifest.version)
                continue
            if manifest.num_neighbors < self._k:
                raise ConfigError(
                    f"model.retro.num_neighbors {self._k} is above the {manifest.num_neighbors} that {path.parent} "
                    "has for each chunk"
                )
            table = NeighborTable(path.parent, self._db.rows, self._db.version.chunks)
            table.check_source(prefix)
            return table
        known = f"; there are those of version {sorted(others)}: see data.retro_version" if others else ""
        raise DataError(
            f"has no neighbors in version {number} of {project.folder}; add it to its query_paths and run "
            f"tools/retro/build_db.py --tasks query-neighbors{known}",
            path=prefix,
        )

    def identity(self) -> str:
        """Of the version's chunks and of the tables: what is read for a row is the same while it is."""
        return ":".join([self._db.version.chunks, *(table.manifest.sha256 for table in self._tables)])

    def read(self, segments: Sequence[Segment]) -> Neighbors:
        """What a row of some segments reads.

        Neighbors from a document that the row holds are left out.

        Raises:
            DataError: a damaged file.
        """
        length = self._chunk_length
        bounds = [0, *itertools.accumulate(segment.length for segment in segments)]
        chunk_bounds_C2, segment_ends_C = chunk_row(bounds, [length - s.start % length for s in segments], length)
        ids_Ck = np.full((len(chunk_bounds_C2), self._k), NONE, dtype=np.int64)
        sources_Ck3 = np.zeros((*ids_Ck.shape, 3), dtype=np.uint32)
        documents = sorted(
            (dataset, segment.record)
            for segment in segments
            for dataset in self._tables[segment.source].manifest.datasets
        )
        asked: dict[int, tuple[list[int], list[tuple[int, int]]]] = {}
        first = 0
        for segment, start, end in zip(segments, bounds[:-1], bounds[1:], strict=True):
            last = first + int(np.searchsorted(chunk_bounds_C2[first:, 0], end))
            places, chunks = asked.setdefault(segment.source, ([], []))
            for place, offset in self._whole_chunks(segment, chunk_bounds_C2[first:last, 0] - start):
                places.append(first + place)
                chunks.append((segment.record, offset))
            first = last
        for source, (places, chunks) in asked.items():
            ids_Ck[places], sources_Ck3[places] = self._tables[source].read_sources(chunks, documents, self._k)
        text_of_Ck, texts = self._unique(ids_Ck)
        sources_U3 = sources_Ck3[ids_Ck >= 0][texts]
        tokens_UR, mask_UR = read_places(self._db.project, sources_U3, np.full(len(texts), True), self._num_tokens)
        return Neighbors(
            chunk_bounds_C2=chunk_bounds_C2,
            segment_ends_C=segment_ends_C,
            text_of_Ck=text_of_Ck,
            lengths_U=mask_UR.sum(1),
            tokens_1N=torch.from_numpy(tokens_UR[mask_UR].astype(np.int64))[None],
        )

    def _whole_chunks(self, segment: Segment, starts: np.ndarray) -> list[tuple[int, int]]:
        """Number and offset in the document of the segment's chunks that end where the database's do."""
        length, table = self._chunk_length, self._tables[segment.source]
        known = int(table.starts[segment.record + 1] - table.starts[segment.record])
        _, document_length = self._sources[segment.source].file.extents(np.array(segment.record))
        found = []
        for place, start in enumerate(starts.tolist()):
            chunk = (segment.start + start) // length
            if chunk < known and ((chunk + 1) * length <= segment.stop or segment.stop == document_length):
                found.append((place, chunk * length))
        return found

    def _unique(self, ids_Ck: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which text each neighbor is, and which of the neighbors, in their order, each text is taken from; one that is
        read again is kept once only where the encoder does not look at the chunk that reads it."""
        there = ids_Ck >= 0
        text_of_Ck = np.full(ids_Ck.shape, NONE, dtype=np.int64)
        texts = np.arange(np.count_nonzero(there))
        text_of_Ck[there] = texts
        if self._share:
            _, texts, text_of_Ck[there] = np.unique(ids_Ck[there], return_index=True, return_inverse=True)
        return text_of_Ck, texts
