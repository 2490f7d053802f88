"""Texts that are not trained on, as packed rows: every record once, the same segments at every layout."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_grit.config.kinds import kind_names, kind_options, load_kind, trained_kinds
from megatron_grit.config.schema import RunConfig
from megatron_grit.config.schema.loss import RoleWeightsConfig
from megatron_grit.config.schema.teacher import TeacherConfig
from megatron_grit.data.order.sources import OpenFiles, SourceRules
from megatron_grit.data.rows.batch import PackedRow
from megatron_grit.data.rows.loader import KINDS, GritDataLoader
from megatron_grit.data.rows.packing import pack
from megatron_grit.data.rows.segments import Segment
from megatron_grit.data.rows.stream import PlannedRow, RowStream
from megatron_grit.data.text.tokenizer import Tokenizer

ROWS_OF_A_STEP = 32
"""About so many rows are read at a time."""


class HeldOutStream(RowStream):
    """The records of ``data.valid`` in their order, a step as many whole ones as fill about :data:`ROWS_OF_A_STEP`
    rows.

    What is longer than a row is split, so that each token is predicted once. Labels are texts and answers whatever the
    run trains on, so that runs can be compared. Rows without a segment make the rows of a step a multiple of
    ``num_rows_multiple``.

    Raises:
        ConfigError, DataError: as for the stream of the kind.
    """

    def __init__(self, config: RunConfig, tokenizer: Tokenizer, num_rows_multiple: int) -> None:
        super().__init__(config, num_rows_multiple)
        self._stream: RowStream = load_kind(KINDS, held_out_kind(config)).STREAM(
            _held_out(config), tokenizer, OpenFiles()
        )
        self.sources, self.neighbors = self._stream.sources, self._stream.neighbors
        sizes = self.sources.sizes
        self._source_R = np.repeat(np.arange(len(sizes)), sizes)
        places_R = np.concatenate([np.arange(size) for size in sizes])
        self._record_R = self.sources.trained_records(self._source_R, places_R)
        lengths_R = np.concatenate(
            [
                self.sources.record_lengths(source, self._record_R[self._source_R == source])
                for source in range(len(sizes))
            ]
        )
        step_R = (np.cumsum(lengths_R) - 1) // (ROWS_OF_A_STEP * self._tokens_per_row)
        self._bounds = np.append(np.flatnonzero(np.diff(step_R, prepend=-1)), len(step_R))
        self.num_steps = len(self._bounds) - 1
        """Steps that hold all records."""

    @classmethod
    def rules(cls, config: RunConfig, tokenizer: Tokenizer) -> SourceRules:
        """As in the base class."""
        stream: type[RowStream] = load_kind(KINDS, held_out_kind(config)).STREAM
        return stream.rules(_held_out(config), tokenizer)

    def segments(self, step: int) -> list[Segment]:
        """As in the base class."""
        part = slice(*self._bounds[step : step + 2])
        records = zip(self._source_R[part].tolist(), self._record_R[part].tolist(), strict=True)
        return [segment for source, record in records for segment in self._stream.segments_of(source, record)]

    def rows(self, step: int) -> list[PlannedRow]:
        """As in the base class; some may be empty."""
        segments = self.segments(step)
        lengths = np.array([segment.length for segment in segments], dtype=np.int64)
        rows = [
            PlannedRow(segments=[segments[slot] for slot in slots], slots=slots)
            for slots in pack(lengths, self._tokens_per_row)
        ]
        empty = PlannedRow(segments=[], slots=np.empty(0, dtype=np.int64))
        return rows + [empty] * (-len(rows) % self._num_rows_multiple)

    def counts(self, rows: Sequence[PlannedRow], data_size: int) -> Any:
        """As in the base class."""
        return self._stream.counts(rows, data_size)

    def make_row(self, row: PlannedRow, row_length: int, pad_id: int) -> PackedRow:
        """As in the base class."""
        return self._stream.make_row(row, row_length, pad_id)

    def source_counts(self, num_steps: int) -> dict[str, int]:
        """As in the base class."""
        counts = np.bincount(self._source_R[: self._bounds[num_steps]], minlength=len(self.sources))
        return dict(zip(self.sources.names, counts.tolist(), strict=True))


class HeldOutLoader(GritDataLoader):
    """Steps that hold every record of ``data.valid`` once; arguments as for the loader of the run.

    Args:
        rows_multiple: rows that each data parallel rank gets are a multiple of this.
    """

    def __init__(self, *args: Any, rows_multiple: int = 1, **options: Any) -> None:
        self._rows_multiple = rows_multiple
        super().__init__(*args, **options)

    def _open(self, config: RunConfig, tokenizer: Tokenizer) -> dict[str, RowStream]:
        self.stream = HeldOutStream(config, tokenizer, self._dp_size * self._rows_multiple)
        return {held_out_kind(config): self.stream}

    def read_as(self, loader: GritDataLoader, step: int) -> None:
        """Read the version of the retrieval database that a run reads.

        Args:
            loader: of the run.
            step: of the run, from 0.
        """
        for change in loader.versions_read():
            if change["first_step"] <= step:
                self.read_versions([change | {"first_step": 0}])


def held_out_kind(config: RunConfig) -> str:
    """The kind whose rows held-out texts become: the first one whose next tokens are predicted, of those that the run
    trains if there is one."""
    kinds = [*trained_kinds(config), *kind_names()]
    return next(kind for kind in kinds if load_kind(KINDS, kind).STREAM.reads_texts)


def _held_out(config: RunConfig) -> RunConfig:
    """The configuration that reads them as the kind reads its own."""
    changed = copy.deepcopy(config)
    section, name = kind_options(held_out_kind(config)).DATA.split(".")
    setattr(getattr(changed, section), name, config.data.valid)
    changed.data.over_long, changed.data.packing = "split", "step"
    changed.loss.labels, changed.loss.role_weights = "it", RoleWeightsConfig()
    changed.loss.teacher = TeacherConfig()
    return changed
