"""The short rows that the audit sends through the model, and what each of their tokens is to see.

A row has three segments and padding. All segments begin with the same tokens, and the first and the last of them are
equal, so that states can be compared as well.

Shape suffix legend: T = tokens of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor

from megatron_grit.config.kinds import load_kind
from megatron_grit.data.order.sources import Sources
from megatron_grit.data.rows.batch import PackedRow
from megatron_grit.data.rows.loader import KINDS
from megatron_grit.data.rows.segments import Segment
from megatron_grit.data.rows.stream import PlannedRow

ROW_LENGTH = 48
"""Tokens, where the layout allows so short a row."""
_OUTER, _PADDING = 11, 10
"""Tokens of the first segment, the last segment, and the padding in a row of ROW_LENGTH."""
_LEAD = 4
"""Tokens of a segment that are neither pooled nor supervised."""


@dataclass(frozen=True)
class AuditRow:
    """A row, and where its segments are."""

    row: PackedRow
    bounds: tuple[tuple[int, int], ...]
    """First token of each segment, and the one after its last; padding left out."""

    @property
    def length(self) -> int:
        """T."""
        return self.row.tokens_1T.shape[1]

    def span(self, start: int, stop: int | None, segments: slice = slice(None)) -> Tensor:
        """Tokens ``start`` to ``stop - 1`` of some segments, counted within each as in a Python slice: bool [T]."""
        chosen_T = torch.zeros(self.length, dtype=torch.bool)
        for first, last in self.bounds[segments]:
            chosen_T[first:last][start:stop] = True
        return chosen_T

    def texts(self) -> Tensor:
        """What is pooled, or supervised: bool [T]."""
        return self.span(_LEAD, None)

    def offsets(self) -> Tensor:
        """Place of each token in its own segment, -1 on padding: int64 [T]."""
        offsets_T = torch.full((self.length,), -1)
        for first, last in self.bounds:
            offsets_T[first:last] = torch.arange(last - first)
        return offsets_T

    def visible(self, causal: bool, window: int | None = None, boundaries: bool = True) -> Tensor:
        """What each token is to see: bool [T, T], a row for each token that looks.

        Args:
            causal: nothing that comes later.
            window: and no more than so many tokens back, the token itself included.
            boundaries: its own segment only.
        """
        places_T = torch.arange(self.length)
        back_TT = places_T[:, None] - places_T[None, :]
        seen_TT = torch.ones_like(back_TT, dtype=torch.bool)
        if boundaries:
            segment_T = torch.full((self.length,), len(self.bounds))
            for number, (first, last) in enumerate(self.bounds):
                segment_T[first:last] = number
            seen_TT = segment_T[:, None] == segment_T[None, :]
        if causal:
            seen_TT = seen_TT & (back_TT >= 0)
        if window is not None:
            seen_TT = seen_TT & (back_TT.abs() < window)
        return seen_TT

    def describe(self, position: int) -> str:
        """A token in words: "token 3 of segment 2"; both count from 1."""
        for number, (first, last) in enumerate(self.bounds, 1):
            if first <= position < last:
                return f"token {position - first + 1} of segment {number}"
        return "padding"


class _SameTokens:
    """Stands for the sources of a run: every record of every source begins with the same tokens."""

    names = ("audit",)

    def __init__(self, tokens: np.ndarray) -> None:
        self._tokens = tokens

    def __getitem__(self, source: int) -> _SameTokens:
        return self

    def tokens(self, record: int, start: int, count: int) -> np.ndarray:
        return self._tokens[start : start + count]


def audit_row(kind: str, vocab_size: int, pad_id: int, row_multiple: int, longest: int) -> AuditRow:
    """A row of three segments, or more where they would be too long, made by the code that makes the run's rows.

    Args:
        kind: name of the row's kind.
        vocab_size: tokens are drawn from it.
        pad_id: token of the padding.
        row_multiple: the row's length is a multiple of it.
        longest: no segment is longer, nor is the padding.
    """
    length = -(-ROW_LENGTH // row_multiple) * row_multiple
    outer, padding = (min(share * length // ROW_LENGTH, longest) for share in (_OUTER, _PADDING))
    inner = length - 2 * outer - padding
    pieces = -(-inner // longest)
    sizes = [outer, *((inner + number) // pieces for number in range(pieces)), outer]
    rows = load_kind(KINDS, kind)
    tokens = np.random.default_rng(0).integers(0, vocab_size, max(sizes))
    segments = [
        Segment(
            sources=cast(Sources, _SameTokens(tokens)),
            source=0,
            record=number,
            start=0,
            stop=size,
            roles=[int(role) for role in rows.LEAD_AND_TEXT],
            lengths=[_LEAD, size - _LEAD],
        )
        for number, size in enumerate(sizes)
    ]
    row = rows.make_row(PlannedRow(segments=segments, slots=np.arange(len(segments))), length, pad_id)
    ends = np.cumsum(sizes).tolist()
    return AuditRow(row, tuple((end - size, end) for size, end in zip(sizes, ends, strict=True)))


def random_states(row: AuditRow, width: int, seed: int) -> Tensor:
    """States to stand for what comes from below, the same at the same place of each segment: fp32 [T, 1, D]."""
    states_T1D = torch.randn(row.length, 1, width, generator=torch.Generator().manual_seed(seed))
    offsets_T = row.offsets()
    return torch.where((offsets_T >= 0)[:, None, None], states_T1D[offsets_T.clamp(min=0)], states_T1D)
