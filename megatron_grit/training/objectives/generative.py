"""Next-token loss on generative rows, and what a teacher adds to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from megatron_grit.config.schema import RunConfig
from megatron_grit.data.rows.batch import PackedRow, StepBatch, to_device
from megatron_grit.losses.next_token import next_token_loss
from megatron_grit.models.decoder import Output
from megatron_grit.parallel.context import ParallelContext
from megatron_grit.training.objectives.base import Objective


class GenerativeObjective(Objective):
    """Each row's share of the token loss; the shares of the global batch's rows add up to it.

    With ``loss.teacher`` what the teacher adds to the loss of a token is weighed and divided as that loss is.
    """

    kind = "generative"
    output = Output.TOKEN_LOSSES
    teacher_loss = "loss_teacher"

    def __init__(self, config: RunConfig, context: ParallelContext) -> None:
        super().__init__(config, context)
        if config.loss.teacher.kind != "none":
            self.extra_metrics = [self.teacher_loss]

    def prepare(self, batch: StepBatch, rows: list[PackedRow], forward_all: Callable[..., list[Tensor]]) -> None:
        """As in the base class."""
        super().prepare(batch, rows, forward_all)
        if self.extra_metrics:
            assert self.teacher is not None
            self.teacher.attach(rows, batch.row_length)

    def total(self, metrics: Mapping[str, float]) -> float:
        """As in the base class."""
        if not self.extra_metrics:
            return super().total(metrics)
        knobs = self.config.loss.teacher
        labels, teacher = metrics[self.loss_name], metrics[self.teacher_loss]
        return self.weight * (knobs.label_weight * labels + knobs.weight * teacher)

    def row_loss(self, index: int, row: PackedRow, output: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """As in the base class."""
        if not self.extra_metrics:
            share = self._share(index, row, output)
            return share * self.weight, {self.loss_name: share.detach()}
        knobs, row.teacher = self.config.loss.teacher, None  # what it holds of the row is not needed any more
        labels, teacher = (self._share(index, row, losses_T) for losses_T in output)
        total = knobs.label_weight * labels + knobs.weight * teacher
        return total * self.weight, {self.loss_name: labels.detach(), self.teacher_loss: teacher.detach()}

    def _share(self, index: int, row: PackedRow, losses_T: Tensor) -> Tensor:
        assert row.loss_mask_1T is not None
        loss, counts = self.config.loss, self.counts
        groups = {"mixed": counts.num_rows, "sequence": counts.num_sequences}
        return next_token_loss(
            losses_T,
            row.loss_mask_1T[0],
            loss.loss_gen_type,
            num_loss_tokens=counts.num_loss_tokens,
            num_groups=groups.get(loss.loss_gen_type, counts.num_groups),
            group_sizes_T=self._group_sizes(index, row) if loss.loss_gen_type == "microbatch_mean" else None,
        )

    def _group_sizes(self, index: int, row: PackedRow) -> Tensor:
        """Labels of the group that each token's segment belongs to: float32 [T], 1 on padding."""
        slots_S = self.rows(self.batch)[index].slots_S  # on the host
        assert row.segment_lengths is not None and slots_S is not None
        sizes = np.ones(len(row.segment_lengths), dtype=np.float32)  # padding comes last
        sizes[: len(slots_S)] = self.counts.group_sizes_S[slots_S.numpy()]
        return to_device(torch.from_numpy(np.repeat(sizes, row.segment_lengths)), self.context.device)


OBJECTIVE = GenerativeObjective
