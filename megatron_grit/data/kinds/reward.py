"""Pairs of answers for a reward model: records of preferences, each conversation of which is embedded as one number.

Shape suffix legend: T = tokens of a row, S = its segments, a conversation each.
"""

from __future__ import annotations

import numpy as np
import torch

from megatron_grit.config.schema import RunConfig
from megatron_grit.data.indexed.roles import Role
from megatron_grit.data.kinds.preference import PreferenceStream
from megatron_grit.data.order.sampler import stream_of
from megatron_grit.data.rows.batch import PackedRow
from megatron_grit.data.rows.row import start_row
from megatron_grit.data.rows.stream import PlannedRow
from megatron_grit.data.text.tokenizer import Tokenizer

LEAD_AND_TEXT = (Role.USER, Role.CHOSEN)


class RewardStream(PreferenceStream):
    """So many pairs a step, each in one row, in an order of their own.

    Raises:
        ConfigError, DataError: as in the base class, and for records of a single answer.
    """

    kind = "reward"
    record_draws = stream_of("reward")
    rows_key = "reward.rows"
    reads_ends = True

    def open_beside(self, config: RunConfig, tokenizer: Tokenizer) -> None:
        """Nothing is read beside the records."""
        self._takes_single, self._why_pairs = False, "a reward model is trained on pairs;"

    def make_row(self, row: PlannedRow, row_length: int, pad_id: int) -> PackedRow:
        """As in the base class."""
        return make_row(row, row_length, pad_id)


def make_row(planned: PlannedRow, row_length: int, pad_id: int) -> PackedRow:
    """A row of conversations, of each of which the last answer is what is pooled.

    Args:
        planned: the segments of the row.
        row_length: T.
        pad_id: token of the padding.

    Raises:
        DataError: a damaged source.
    """
    _, row = start_row(RewardStream.kind, True, planned.segments, row_length, pad_id)
    pool_mask_T = np.zeros(row_length, dtype=np.float32)
    end = 0
    for segment in planned.segments:
        end += segment.length
        pool_mask_T[end - segment.lengths[-1] : end] = 1.0
    sizes = np.diff(row.cu_seqlens.numpy())
    row.segment_ids_T = torch.from_numpy(np.repeat(np.arange(len(sizes)), sizes))  # of padding, which is last, S
    row.pool_mask_T, row.slots_S = torch.from_numpy(pool_mask_T), torch.from_numpy(planned.slots)
    return row


STREAM = RewardStream
