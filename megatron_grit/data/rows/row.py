"""Segments to packed rows: what rows of every kind have in common.

Shape suffix legend: T = tokens of a row.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from megatron_grit.data.indexed.roles import Role
from megatron_grit.data.rows.batch import PackedRow
from megatron_grit.data.rows.segments import Segment

PADDING_ROLE = len(Role)
"""Stands for the role of padding."""


def start_row(
    kind: str, embeds: bool, segments: Sequence[Segment], row_length: int, pad_id: int
) -> tuple[np.ndarray, PackedRow]:
    """A row without its kind's masks and labels.

    Room for the markers of a segment is left at its end.

    Args:
        kind: name of the row's kind.
        embeds: see :class:`~megatron_grit.data.rows.batch.PackedRow`.
        segments: the segments of the row.
        row_length: T.
        pad_id: token of the padding.

    Returns:
        Role of each token, :data:`PADDING_ROLE` on padding: int8 [T]; and the row.

    Raises:
        DataError: a damaged source.
    """
    tokens_T = np.full(row_length, pad_id, dtype=np.int64)
    roles: list[int] = []
    lengths: list[int] = []
    bounds = [0]
    for segment in segments:
        end = bounds[-1] + segment.length
        source = segment.sources[segment.source]
        size = segment.stop - segment.start
        tokens_T[bounds[-1] : bounds[-1] + size] = source.tokens(segment.record, segment.start, size)
        if (rest := segment.rest) is not None:
            tokens_T[bounds[-1] + size : end] = rest.sources[rest.source].tokens(rest.record, rest.start, rest.length)
        roles += segment.roles
        lengths += segment.lengths
        lengths[-1] += segment.markers.num_tokens
        bounds.append(end)
    num_tokens = bounds[-1]
    if num_tokens < row_length:
        roles.append(PADDING_ROLE)
        lengths.append(row_length - num_tokens)
        bounds.append(row_length)
    starts, sizes = np.array(bounds[:-1]), np.diff(bounds)
    every = np.arange(row_length)
    return np.repeat(np.array(roles, dtype=np.int8), lengths), PackedRow(
        kind=kind,
        embeds=embeds,
        tokens_1T=torch.from_numpy(tokens_T)[None],
        positions_1T=torch.from_numpy(every - np.repeat(starts, sizes))[None],
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
        max_seqlen=int(sizes.max()),
        padding_mask_1T=torch.from_numpy(every >= num_tokens)[None],
        record_ids=[segment.name for segment in segments],
    )
