"""Texts and conversations for the focal loss: rows of the same make as those of next tokens."""

from __future__ import annotations

from megatron_grit.config.schema import RunConfig
from megatron_grit.data.kinds import generative
from megatron_grit.data.order.sampler import stream_of
from megatron_grit.data.rows.batch import PackedRow
from megatron_grit.data.rows.stream import PlannedRow

LEAD_AND_TEXT = generative.LEAD_AND_TEXT


class FocalStream(generative.GenerativeStream):
    """So many sequences a step, in an order of their own."""

    kind = "focal"
    record_draws = stream_of("focal")

    @staticmethod
    def full_rows(config: RunConfig) -> int | None:
        """Rows are as full as the sequences of a step make them."""
        return None


def make_row(planned: PlannedRow, row_length: int, pad_id: int) -> PackedRow:
    """A row of this kind."""
    return generative.make_row(planned, row_length, pad_id, kind=FocalStream.kind)


STREAM = FocalStream
