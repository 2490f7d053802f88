"""What every kind of row has: a stream of segments for each step, and the rows that are made of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from megatron_grit.config.schema import RunConfig
from megatron_grit.data.chat.run_chat import label_weights
from megatron_grit.data.indexed.label_weights import LabelWeights
from megatron_grit.data.order.sources import SourceRules, Sources
from megatron_grit.data.rows.batch import PackedRow
from megatron_grit.data.rows.neighbor_versions import NeighborVersions
from megatron_grit.data.rows.packing import pack
from megatron_grit.data.rows.segments import Segment
from megatron_grit.data.text.tokenizer import Tokenizer
from megatron_grit.errors import ConfigError


def cache_folder(config: RunConfig) -> str:
    """Where index caches are."""
    return config.data.cache_dir or str(Path(config.output_dir) / "cache")


@dataclass(frozen=True, kw_only=True)
class PlannedRow:
    """The segments of a row, before their tokens are read."""

    segments: list[Segment]
    slots: np.ndarray
    """int64 [S]; place of each among the segments of the step."""

    @property
    def length(self) -> int:
        """Tokens without padding."""
        return sum(segment.length for segment in self.segments)


class RowStream(ABC):
    """The rows of one kind, step by step. Everything is a function of the step, the same on all ranks.

    Args:
        config: the run.
        num_rows_multiple: the rows of a step are a multiple of this.
    """

    kind: ClassVar[str]
    """Name of the kind."""
    reads_texts: ClassVar[bool] = True
    """Whether its records are texts and conversations, of which held-out ones may become rows too."""
    reads_ends: ClassVar[bool] = False
    """Whether what is trained is read at the last token of a conversation, so that an answer has to have its end."""
    sources: Sources
    fixed_length: int | None = None
    """Tokens that every row is padded to; None: as many as the row's segments have, or those of the longest row."""

    neighbors: NeighborVersions | None = None
    """What the rows read beside their segments; None: nothing."""

    def __init__(self, config: RunConfig, num_rows_multiple: int) -> None:
        self._tokens_per_row, self._num_rows_multiple = config.data.tokens_per_row, num_rows_multiple

    @classmethod
    @abstractmethod
    def rules(cls, config: RunConfig, tokenizer: Tokenizer) -> SourceRules:
        """What a run asks of the sources of this kind.

        Raises:
            ConfigError: options that the kind cannot fill rows by.
        """

    @staticmethod
    def labels(config: RunConfig, tokenizer: Tokenizer) -> LabelWeights:
        """Weights of the labels of rows whose next tokens are predicted.

        Raises:
            ConfigError, DataError: as :func:`~megatron_grit.data.chat.run_chat.label_weights`.
        """
        return label_weights(config, tokenizer)

    @staticmethod
    def full_rows(config: RunConfig) -> int | None:
        """Rows of a step, each filled from the stream of sequences. None: the segments of a step fill its rows.

        Raises:
            ConfigError: rows are to be full, and their number is not given.
        """
        return None

    @abstractmethod
    def segments(self, step: int) -> list[Segment]:
        """All segments of a step; the data fingerprint is taken of them, in this order.

        Raises:
            DataError: a record that breaks the grammar, has nothing to train on, or is too long.
            ConfigError: no batch can be filled.
        """

    def units(self, step: int) -> list[list[Segment]]:
        """The segments of a step, those together that have to stand in one row; by default each by itself."""
        return [[segment] for segment in self.segments(step)]

    def rows(self, step: int) -> list[PlannedRow]:
        """The rows of a step: by default as few, nearly equal rows as hold its segments.

        Raises:
            DataError: as for :meth:`segments`.
            ConfigError: as for :meth:`segments`, or fewer segments than rows.
        """
        units = self.units(step)
        lengths = np.array([sum(segment.length for segment in unit) for unit in units], dtype=np.int64)
        try:
            packed = pack(lengths, self._tokens_per_row, self._num_rows_multiple)
        except ConfigError as error:
            raise ConfigError(f"{self.kind} batch: {error}") from None
        firsts = np.cumsum([0, *map(len, units)]).tolist()
        return [
            PlannedRow(
                segments=[segment for number in numbers.tolist() for segment in units[number]],
                slots=np.concatenate([np.arange(firsts[number], firsts[number + 1]) for number in numbers.tolist()]),
            )
            for numbers in packed
        ]

    def segments_of(self, source: int, record: int) -> list[Segment]:
        """What becomes of one record of a kind whose next tokens are predicted.

        Raises:
            DataError: a record that breaks the grammar, has nothing to predict, or is too long.
        """
        raise NotImplementedError(f"rows of {self.kind} are made of more than one record")

    def baseline_rows(self, step: int) -> list[PlannedRow]:
        """Rows of a step that nothing is trained on: the model only looks at them first. By default none.

        Raises:
            DataError, ConfigError: as for :meth:`rows`.
        """
        return []

    @abstractmethod
    def counts(self, rows: Sequence[PlannedRow], data_size: int) -> Any:
        """What the losses are divided by.

        Args:
            rows: of the global batch; row r is data parallel rank r % data_size's.
            data_size: data parallel size.
        """

    @abstractmethod
    def make_row(self, row: PlannedRow, row_length: int, pad_id: int) -> PackedRow:
        """A row with its tokens, padded to ``row_length``.

        Raises:
            DataError: a damaged source.
        """

    @abstractmethod
    def source_counts(self, num_steps: int) -> dict[str, int]:
        """Samples of each source in the first steps."""
