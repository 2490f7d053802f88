"""Segments to packed rows: tokens, positions, labels and masks.

Shape suffix legend: T = tokens of a row, S = segments of a row.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from megatron_grit.data.indexed.roles import Role, RowKind, pooled, supervised
from megatron_grit.data.rows.batch import PackedRow
from megatron_grit.data.rows.segments import Segment

_PADDING_ROLE = len(Role)
_SUPERVISED = np.array([*(supervised(role) for role in Role), False], dtype=np.float32)
_POOLED = np.array([*(pooled(role) for role in Role), False], dtype=np.float32)


def embedding_row(texts: Sequence[Segment], slots: np.ndarray, row_length: int, pad_id: int) -> PackedRow:
    """A row of queries and passages.

    Args:
        texts: the segments of the row.
        slots: int64 [S], place of each in the global list of texts.
        row_length: T.
        pad_id: token of the padding.

    Raises:
        DataError: a damaged source.
    """
    roles_T, row = _row(RowKind.EMBEDDING, texts, row_length, pad_id)
    _put_markers(row, texts)
    sizes = np.diff(row.cu_seqlens.numpy())
    segment_ids_T = np.repeat(np.arange(len(sizes)), sizes)  # padding comes last: its number is S
    row.segment_ids_T = torch.from_numpy(segment_ids_T)
    row.pool_mask_T = torch.from_numpy(_POOLED[roles_T])
    row.slots_S = torch.from_numpy(slots)
    row.is_query_S = torch.tensor([text.roles[-1] == Role.QUERY for text in texts])
    return row


def _put_markers(row: PackedRow, texts: Sequence[Segment]) -> None:
    """Around each text its markers, for which :func:`_row` has left room at the end of the segment."""
    if not any(text.markers.num_tokens for text in texts):
        return
    tokens_T, mask_T = row.tokens_1T[0].numpy(), np.zeros(row.tokens_1T.shape[1], dtype=bool)
    end = 0
    for text in texts:
        opening, closing, end = text.markers.opening, text.markers.closing, end + text.length
        size = text.lengths[-1]
        begin = end - size - len(opening) - len(closing)
        ids = tokens_T[begin : begin + size].copy()
        tokens_T[begin:end] = [*opening, *ids, *closing]
        mask_T[begin:end] = True
        mask_T[begin + len(opening) : end - len(closing)] = False
    row.marker_mask_T = torch.from_numpy(mask_T)


def generative_row(sequences: Sequence[Segment], row_length: int, pad_id: int) -> PackedRow:
    """A row of texts and conversations; arguments and errors as for :func:`embedding_row`."""
    roles_T, row = _row(RowKind.GENERATIVE, sequences, row_length, pad_id)
    tokens_T, positions_T = row.tokens_1T[0].numpy(), row.positions_1T[0].numpy()
    # Position t predicts token t + 1 of its own segment, if that one has a supervised role.
    follows = (positions_T[1:] > 0) & (roles_T[1:] != _PADDING_ROLE)
    mask_1T = np.zeros((1, row_length), dtype=np.float32)
    mask_1T[0, :-1] = _SUPERVISED[roles_T[1:]] * follows
    labels_1T = np.zeros((1, row_length), dtype=np.int64)
    labels_1T[0, :-1] = tokens_T[1:] * follows
    row.labels_1T, row.loss_mask_1T = torch.from_numpy(labels_1T), torch.from_numpy(mask_1T)
    return row


def _row(kind: RowKind, segments: Sequence[Segment], row_length: int, pad_id: int) -> tuple[np.ndarray, PackedRow]:
    """Role of each token of a row (int8 [T], _PADDING_ROLE on padding), and the row without its masks."""
    tokens_T = np.full(row_length, pad_id, dtype=np.int64)
    roles: list[int] = []
    lengths: list[int] = []
    bounds = [0]
    for segment in segments:
        end = bounds[-1] + segment.length
        source = segment.sources[segment.source]
        size = segment.stop - segment.start
        tokens_T[bounds[-1] : bounds[-1] + size] = source.tokens(segment.record, segment.start, size)
        roles += segment.roles
        lengths += segment.lengths
        lengths[-1] += segment.markers.num_tokens
        bounds.append(end)
    num_tokens = bounds[-1]
    if num_tokens < row_length:
        roles.append(_PADDING_ROLE)
        lengths.append(row_length - num_tokens)
        bounds.append(row_length)
    starts, sizes = np.array(bounds[:-1]), np.diff(bounds)
    every = np.arange(row_length)
    return np.repeat(np.array(roles, dtype=np.int8), lengths), PackedRow(
        kind=kind,
        tokens_1T=torch.from_numpy(tokens_T)[None],
        positions_1T=torch.from_numpy(every - np.repeat(starts, sizes))[None],
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
        max_seqlen=int(sizes.max()),
        padding_mask_1T=torch.from_numpy(every >= num_tokens)[None],
        record_ids=[segment.name for segment in segments],
    )
