"""The focal loss on rows of the global batch."""

from __future__ import annotations

from torch import Tensor

from megatron_grit.data.rows.batch import PackedRow
from megatron_grit.losses.focal import focal_loss
from megatron_grit.models.decoder import Output
from megatron_grit.training.objectives.base import Objective


class FocalObjective(Objective):
    """Each row's share of the focal loss; under context parallelism each rank has the losses of its own tokens."""

    kind = "focal"
    output = Output.TOKEN_LOSSES

    def row_loss(self, index: int, row: PackedRow, output: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """As in the base class."""
        assert row.loss_mask_1T is not None
        gamma = self.config.focal.gamma  # type: ignore[attr-defined]
        share, easy = focal_loss(output, row.loss_mask_1T[0], gamma, self.counts.num_loss_tokens)
        return share * self.weight, {self.loss_name: share.detach(), "easy_focal": easy}


OBJECTIVE = FocalObjective
