"""Log-probabilities of the answers of rows under a model that is not trained at that moment."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_grit import compat
from megatron_grit.data.rows.batch import PackedRow
from megatron_grit.losses.log_probs import segment_sums
from megatron_grit.models.decoder import GritDecoder, Output
from megatron_grit.parallel.collectives import sum_over_group
from megatron_grit.parallel.context import ParallelContext
from megatron_grit.training.teacher.model import forward_rows, frozen


def answer_log_probs(row: PackedRow, output: Tensor, context: ParallelContext) -> Tensor:
    """Log-probability of the supervised tokens of each segment: float64 [S], on the last stage.

    Under context parallelism it is the same on all ranks of the group, and each has the gradient of its own tokens.

    Args:
        row: of which each token has a segment.
        output: token losses, fp32 [T]; 0 of what another context parallel rank holds.
        context: this process's place in the mesh.
    """
    assert row.loss_mask_1T is not None and row.segment_ids_T is not None
    sums_S = segment_sums(output, row.loss_mask_1T[0], row.segment_ids_T, len(row.record_ids))
    if context.context_size > 1:
        sums_S = sum_over_group(sums_S, context.context_group)
    return -sums_S


def frozen_log_probs(
    chunks: Sequence[GritDecoder],
    context: ParallelContext,
    rows: list[PackedRow],
    row_length: int,
    *,
    with_adapters: bool,
) -> list[Tensor]:
    """Log-probabilities of the answers of rows without a graph, dropout or noise, through the run's mesh.

    Args:
        chunks: of this process.
        context: its place in the mesh.
        rows: of this data parallel rank, on the device, as many as others have.
        row_length: T of the longest row of all ranks.
        with_adapters: leave adapters on.

    Returns:
        Of each row float64 [S], on the last stage; nothing on others.
    """
    with torch.no_grad(), frozen(chunks, with_adapters=with_adapters):
        outputs = forward_rows(chunks, context, rows, Output.TOKEN_LOSSES, row_length, "reference")
        found = [answer_log_probs(row, output, context) for row, output in zip(rows, outputs, strict=False)]
    compat.take_balancing_loss()  # of the frozen model's experts
    return found
