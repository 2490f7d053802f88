"""Log-probabilities of the answers of a run's records under the model that it starts from.

They are computed before the first step, by the model of the run on its mesh, for the records that its steps take, and
kept on disk (:mod:`~megatron_grit.training.reference.cache`). No second model is loaded, then or later.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_grit.config.schema import RunConfig
from megatron_grit.data.order.sources import Sources
from megatron_grit.data.rows.batch import PackedRow
from megatron_grit.data.rows.packing import fill_rows
from megatron_grit.data.rows.segments import Segment
from megatron_grit.data.rows.stream import PlannedRow, cache_folder
from megatron_grit.errors import ConfigError
from megatron_grit.models.decoder import GritDecoder
from megatron_grit.parallel.collectives import from_last_stage, gather_in_order
from megatron_grit.parallel.context import ParallelContext
from megatron_grit.store.logs import get_logger
from megatron_grit.store.progress import Progress
from megatron_grit.training.reference.cache import RecordNumbers, identity_of_model
from megatron_grit.training.reference.forward import frozen_log_probs

log = get_logger(__name__)

_SIDES = ("chosen", "rejected")
_ROWS_AT_ONCE = 8
"""Rows of a data parallel rank between two exchanges."""
_SECONDS_OF_A_PART = 60.0
"""After so long what was computed is written."""


class MeasuredStream(Protocol):
    """Of a run's kinds: one with answers whose log-probabilities are wanted."""

    sources: Sources

    @property
    def width(self) -> int:
        """Numbers of a record."""

    def measured(self, source: int, record: int) -> list[tuple[int, Segment]]:
        """What is asked about a record, each with its place among the numbers of it."""

    def make_row(self, row: PlannedRow, row_length: int, pad_id: int) -> PackedRow:
        """As of a stream of rows."""


class ReferenceLogProbs:
    """Reads the reference's log-probabilities by source and record.

    Args:
        config: the run.
        context: this process's place in the mesh.
        stream: makes the conversations of a record, and rows of them.
        weights: fingerprint of the reference's weights.
        folder: of caches. None: beside other caches of the data.

    Raises:
        DataError: a damaged cache.
    """

    def __init__(
        self, config: RunConfig, context: ParallelContext, stream: MeasuredStream, weights: str, folder: str | None
    ) -> None:
        self._config, self._context, self._stream = config, context, stream
        self.folder = folder or f"{cache_folder(config)}/reference"
        """Of caches."""
        self._sources = [
            RecordNumbers(
                self.folder,
                self._identity(number, weights),
                stream.sources.meta(number).num_records,
                stream.width,
            )
            for number in range(len(stream.sources))
        ]

    def _identity(self, source: int, weights: str) -> dict[str, object]:
        sources = self._stream.sources
        identity: dict[str, object] = {
            "what": "log-probabilities of answers 1",
            "data": sources.identity([source])[0],
            **identity_of_model(self._config, weights),
            "numbers": self._stream.width,
        }
        limits = [sources.longest_segment, sources.longest_unit]
        # What has the answer of another record may be longer than any record.
        if sources.meta(source).longest_segment_tokens > min(limits) or self._stream.width > len(_SIDES):
            identity["cut"] = [sources.rules.policy, *limits]
        return identity

    def of(self, row: PackedRow) -> Tensor:
        """Log-probability of the answer of each segment: float64 [S], on the host."""
        assert row.records_S3 is not None
        found = [self._sources[source].values[record, place] for source, record, place in row.records_S3.tolist()]
        return torch.tensor(found, dtype=torch.float64)

    def missing(self, sources: np.ndarray, records: np.ndarray) -> np.ndarray:
        """Which of some records no rank may do without: those that some rank has not read. int64 [N, 2], ascending.
        Collective."""
        wanted = np.unique(np.stack((sources, records), 1), axis=0)
        gone = np.zeros(len(wanted), dtype=np.int8)
        for number, source in enumerate(self._sources):
            chosen = wanted[:, 0] == number
            gone[chosen] = ~source.has(wanted[chosen, 1])
        agreed = torch.from_numpy(gone).to(self._context.device)
        dist.all_reduce(agreed, op=dist.ReduceOp.MAX)
        return wanted[agreed.cpu().numpy() > 0]

    def compute(self, wanted: np.ndarray, chunks: Sequence[GritDecoder], pad_id: int) -> None:
        """Compute the numbers of some records under the weights that are there, and write them. Collective.

        Args:
            wanted: int64 [N, 2] of :meth:`missing`.
            chunks: of this process.
            pad_id: token of the padding.
        """
        context, began = self._context, time.monotonic()
        written, done = 0, 0
        log.info(f"computing the reference's log-probabilities of {len(wanted):,} records")
        with Progress(len(wanted), "reference", "record", enabled=context.rank == 0) as bar:
            while done < len(wanted):
                taken = self._some(wanted, done)
                self._compute(taken, wanted[done : done + len(taken)], chunks, pad_id)
                done += len(taken)
                bar.update(len(taken))
                if done == len(wanted) or time.monotonic() - began > _SECONDS_OF_A_PART:
                    self._write(wanted[written:done])
                    written, began = done, time.monotonic()

    def _some(self, wanted: np.ndarray, start: int) -> list[list[tuple[int, Segment]]]:
        """What is measured of the next records, as many as fill a few rows on each data parallel rank."""
        budget = self._config.data.tokens_per_row * _ROWS_AT_ONCE * self._context.data_size
        taken: list[list[tuple[int, Segment]]] = []
        while start + len(taken) < len(wanted) and budget > 0:
            source, record = wanted[start + len(taken)].tolist()
            taken.append(self._stream.measured(source, record))
            budget -= sum(segment.length for _, segment in taken[-1])
        return taken

    def _compute(
        self,
        taken: list[list[tuple[int, Segment]]],
        records: np.ndarray,
        chunks: Sequence[GritDecoder],
        pad_id: int,
    ) -> None:
        """Numbers of some records, into memory; 0 where a record has none at a place, or is left out."""
        places = [(number, place) for number, measured in enumerate(taken) for place, _ in measured]
        segments = [segment for measured in taken for _, segment in measured]
        values = np.zeros((len(taken), self._stream.width))
        if segments:
            found = self._measure(segments, chunks, pad_id)
            values[tuple(np.array(places).T)] = found.numpy()
        for number, source in enumerate(self._sources):
            chosen = records[:, 0] == number
            source.put(records[chosen, 1], values[chosen])

    def _measure(self, segments: list[Segment], chunks: Sequence[GritDecoder], pad_id: int) -> Tensor:
        """Log-probability of the answer of each segment: float64, on the host of every rank. Segments are packed into
        rows without regard to records."""
        context, multiple = self._context, self._context.row_multiple
        lengths = np.array([segment.length for segment in segments], dtype=np.int64)
        rows = fill_rows(lengths, self._config.data.tokens_per_row, np.zeros(len(segments), dtype=bool))
        row_length = -(-max(int(lengths[row].sum()) for row in rows) // multiple) * multiple
        shares = [rows[rank :: context.data_size] for rank in range(context.data_size)]
        mine = shares[context.data_rank]
        # Every rank runs as many rows as the first; what is over is left out again.
        made = [
            self._stream.make_row(
                PlannedRow(segments=[segments[slot] for slot in row], slots=np.arange(len(row))), row_length, pad_id
            ).to(context.device)
            for row in (mine + rows[:1])[: len(shares[0])]
        ]
        found = frozen_log_probs(chunks, context, made, row_length, with_adapters=True)
        values = torch.zeros(len(segments), 1, dtype=torch.float64, device=context.device)
        if context.is_last_stage:
            own = torch.cat([values[:0, 0], *found[: len(mine)]])[:, None]
            slots = [torch.from_numpy(np.concatenate([*share, lengths[:0]])) for share in shares]
            values = gather_in_order(own, slots, context.data_group)
        return from_last_stage(values, context)[:, 0].cpu()

    def _write(self, wanted: np.ndarray) -> None:
        if self._context.rank == 0:
            for number, source in enumerate(self._sources):
                records = wanted[wanted[:, 0] == number, 1]
                if len(records):
                    source.write(records)


def refuse_missing(missing: np.ndarray, names: Sequence[str], folder: str, key: str) -> None:
    """Raise where a resumed run lacks numbers of its reference.

    Args:
        missing: int64 [N, 2], source and record.
        names: of the sources.
        folder: where the numbers should be.
        key: the configuration's key of the folder.

    Raises:
        ConfigError: it does; the model that it resumes with is not the reference.
    """
    if len(missing):
        source, record = missing[0].tolist()
        raise ConfigError(
            f"the reference's log-probabilities of {len(missing):,} records are not in {folder}, of {names[source]}"
            f"#{record} for one, and a resumed run has the reference no more; bring the folder back, or start the run "
            f"anew in another output_dir with {key} {folder} and as many training.steps"
        )
