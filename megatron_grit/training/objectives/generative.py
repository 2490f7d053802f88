"""Next-token loss on generative rows."""

from __future__ import annotations

from torch import Tensor

from megatron_grit.data.rows.batch import PackedRow
from megatron_grit.losses.next_token import next_token_loss
from megatron_grit.models.decoder import Output
from megatron_grit.training.objectives.base import Objective


class GenerativeObjective(Objective):
    """Each row's share of the token loss; the shares of the global batch's rows add up to it."""

    kind = "generative"
    output = Output.TOKEN_LOSSES

    def row_loss(self, index: int, row: PackedRow, output: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """As in the base class."""
        assert row.loss_mask_1T is not None
        share = next_token_loss(
            output,
            row.loss_mask_1T[0],
            self.config.loss.loss_gen_type,
            num_loss_tokens=self.counts.num_loss_tokens,
            num_sequences=self.counts.num_sequences,
            num_rows=self.counts.num_rows,
        )
        return share * self.weight, {self.loss_name: share.detach()}


OBJECTIVE = GenerativeObjective
