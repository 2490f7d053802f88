"""The rows of a step in numbers, as memory and operations are estimated from them."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from megatron_grit.config.knob import knob
from megatron_grit.config.schema import RunConfig

LOGITS_AT_ONCE = 1 << 24
"""Logits that are compared with a teacher's at a time."""
SIMILARITIES_AT_ONCE = 1 << 24
"""Similarities that the contrastive loss holds at once: 64 MiB in fp32."""


@dataclass(frozen=True, kw_only=True)
class TextLengths:
    """What a plan assumes of the data."""

    text_tokens: int = knob(256, at_least=1)
    """Mean tokens of a query or passage."""
    sequence_tokens: int = knob(1024, at_least=1)
    """Mean tokens of a generative sequence."""
    supervised_share: float = knob(1.0, at_least=0, at_most=1)
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
    samples: int = 0
    """Samples of the global batch: queries of pairs, sequences of texts."""
    segments: int = 0
    """Segments of the global batch."""
    labels: int = 0
    """Labels of the global batch."""
    segment_tokens: float = 1.0
    """Mean length of a segment; attention pays for it."""
    row_tokens: int = 0
    """Tokens of the longest row."""
    row_labels: int = 0
    """Most labels of a row."""
    measured: int = 0
    """Passes of as many rows through the model forward alone, logits included, whose log-probabilities the loss
    compares."""
    rows_beside: int = 0
    """Rows of the global batch that are measured and not trained on."""


@dataclass(frozen=True, kw_only=True)
class LossCost:
    """What a loss takes besides the rows' own passes through the model."""

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
    return rows, _longest_row(config, data_size, tokens, rows, segment_tokens)


def predicted_rows(
    config: RunConfig,
    kind: str,
    data_size: int,
    lengths: TextLengths,
    *,
    batch_size: int,
    full_rows: int | None = None,
) -> RowWorkload:
    """Rows of sequences whose next tokens are predicted.

    Args:
        config: the run.
        kind: name of the kind.
        data_size: data parallel size.
        lengths: of the data; no sequence is longer than a row.
        batch_size: sequences of the global batch.
        full_rows: rows of the global batch that are filled from the stream of sequences. None: the sequences of the
            batch fill them.
    """
    budget = config.data.tokens_per_row
    sequence_tokens = min(lengths.sequence_tokens, budget)
    if full_rows is None:
        tokens = batch_size * sequence_tokens
        rows, row_tokens = rows_of_tokens(config, data_size, tokens, sequence_tokens)
    else:
        rows, tokens = full_rows, full_rows * budget
        row_tokens = _longest_row(config, data_size, tokens, rows, sequence_tokens)
    return RowWorkload(
        kind=kind,
        embeds=False,
        tokens=tokens,
        rows=rows,
        samples=tokens // sequence_tokens,
        segments=tokens // sequence_tokens,
        labels=int(tokens * lengths.supervised_share),
        segment_tokens=sequence_tokens,
        row_tokens=row_tokens,
        row_labels=ceil(row_tokens * lengths.supervised_share),
    )


def _longest_row(config: RunConfig, data_size: int, tokens: int, rows: int, segment_tokens: int) -> int:
    """Tokens of the longest of so many rows. They are nearly equal, but a row of what fills the fewest may be full."""
    budget, multiple = config.data.tokens_per_row, config.data.num_rows_multiple or data_size
    return budget if rows > multiple else min(budget, max(segment_tokens, tokens // max(rows, 1)))
