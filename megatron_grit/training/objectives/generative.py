"""Next-token loss on generative rows."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from megatron_grit.data.rows.batch import PackedRow, to_device
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
        loss, counts = self.config.loss, self.counts
        groups = {"mixed": counts.num_rows, "sequence": counts.num_sequences}
        share = next_token_loss(
            output,
            row.loss_mask_1T[0],
            loss.loss_gen_type,
            num_loss_tokens=counts.num_loss_tokens,
            num_groups=groups.get(loss.loss_gen_type, counts.num_groups),
            group_sizes_T=self._group_sizes(index, row) if loss.loss_gen_type == "microbatch_mean" else None,
        )
        return share * self.weight, {self.loss_name: share.detach()}

    def _group_sizes(self, index: int, row: PackedRow) -> Tensor:
        """Labels of the group that each token's segment belongs to: float32 [T], 1 on padding."""
        slots_S = self.rows(self.batch)[index].slots_S  # on the host
        assert row.segment_lengths is not None and slots_S is not None
        sizes = np.ones(len(row.segment_lengths), dtype=np.float32)  # padding comes last
        sizes[: len(slots_S)] = self.counts.group_sizes_S[slots_S.numpy()]
        return to_device(torch.from_numpy(np.repeat(sizes, row.segment_lengths)), self.context.device)


OBJECTIVE = GenerativeObjective
