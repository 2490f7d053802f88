"""The rows of a step in numbers, as memory and operations are estimated from them. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Any

from megatron_grit.config.schema import RunConfig


@dataclass(frozen=True, kw_only=True)
class TextLengths:
    """What a plan assumes of the data."""

    text_tokens: int = 256
    """Mean tokens of a query or passage."""
    sequence_tokens: int = 1024
    """Mean tokens of a generative sequence."""
    supervised_share: float = 1.0
    """Share of the generative tokens that are labels."""


@dataclass(frozen=True, kw_only=True)
class RowWorkload:
    """The rows of one kind in a step."""

    kind: str
    embeds: bool
    """Whether they are embedded; if not, their next tokens are predicted."""
    causal: bool = True
    """Their attention."""
    tokens: int = 0
    """Tokens of the global batch, padding left out."""
    rows: int = 0
    """Rows of the global batch."""
    segment_tokens: float = 1.0
    """Mean length of a segment; attention pays for it."""
    row_tokens: int = 0
    """Tokens of the longest row."""
    row_labels: int = 0
    """Most labels of a row."""
    counts: Any = None
    """What its losses are divided by, counted over the global batch: the dataclass of its file in data/kinds."""

    @property
    def segments(self) -> int:
        """Segments of the global batch."""
        return 0 if self.counts is None else self.counts.num_segments

    @property
    def labels(self) -> int:
        """Labels of the global batch."""
        return 0 if self.counts is None else self.counts.num_labels


@dataclass(frozen=True, kw_only=True)
class LossCost:
    """What a loss takes besides the rows' own passes through the model."""

    name: str
    memory: int = 0
    """Bytes on each rank of the last pipeline stage while the loss is computed."""
    operations: float = 0.0
    """Floating-point operations of the global batch, gradient included."""


def rows_of_tokens(config: RunConfig, data_size: int, tokens: int, segment_tokens: int) -> tuple[int, int]:
    """Rows of the global batch that these tokens are packed into, and tokens of the longest.

    Args:
        config: the run.
        data_size: data parallel size.
        tokens: of the global batch.
        segment_tokens: of each segment.
    """
    budget, multiple = config.data.tokens_per_row, config.data.num_rows_multiple or data_size
    rows = -(-ceil(tokens / budget) // multiple) * multiple
    return rows, longest_row(config, data_size, tokens, rows, segment_tokens)


def longest_row(config: RunConfig, data_size: int, tokens: int, rows: int, segment_tokens: int) -> int:
    """Tokens of the longest of so many rows. They are nearly equal, but a row of what fills the fewest may be full."""
    budget, multiple = config.data.tokens_per_row, config.data.num_rows_multiple or data_size
    return budget if rows > multiple else min(budget, max(segment_tokens, tokens // max(rows, 1)))
