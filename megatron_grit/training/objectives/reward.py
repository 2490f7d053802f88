"""The loss of a reward model on rows of whole pairs.

Shape suffix legend: P = pairs of a row. Its segments are a conversation each, the preferred answer of a pair first and
the other one next.
"""

from __future__ import annotations

from torch import Tensor

from megatron_grit.config.schema import RunConfig
from megatron_grit.config.schema.kinds.reward import METRICS, section
from megatron_grit.data.rows.batch import PackedRow
from megatron_grit.losses.reward import bradley_terry
from megatron_grit.models.decoder import Output
from megatron_grit.parallel.context import ParallelContext
from megatron_grit.training.objectives.base import Objective


class RewardObjective(Objective):
    """Each row's share of the loss; the shares of the global batch's rows add up to its mean over pairs."""

    kind = "reward"
    output = Output.EMBEDDINGS

    def __init__(self, config: RunConfig, context: ParallelContext) -> None:
        super().__init__(config, context)
        self.own = section(config)

    def row_loss(self, index: int, row: PackedRow, output: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """As in the base class. Context parallel ranks compute the same loss, each with the gradient of its tokens."""
        chosen_P, rejected_P = output.view(-1, 2).unbind(1)
        losses_P = bradley_terry(chosen_P, rejected_P, margin=self.own.margin, centering=self.own.centering)
        margins_P = chosen_P - rejected_P
        loss, *others = (
            values_P.sum() / self.counts.num_records
            for values_P in (losses_P, margins_P > 0, margins_P, chosen_P, rejected_P)
        )
        # Metrics are summed over ranks, and every context parallel rank has the whole row's.
        share = 0.0 if self.context.context_rank else 1.0
        metrics = {name: value.detach() * share for name, value in zip(METRICS, (loss, *others), strict=True)}
        return loss * self.weight, metrics


OBJECTIVE = RewardObjective
