"""The router of a mixture of experts, with a z-loss that does not depend on how a row is sharded."""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor


class PackedRouter(TopKRouter):  # type: ignore[misc]
    """The engine's router over packed rows.

    The engine averages the z-loss over the tokens of each sequence and context parallel rank, then over ranks
    (router.py:486). Padding is at the end of a row, so ranks have different numbers of tokens, and the mean of these
    means is not the mean over the row.
    """

    def apply_z_loss(self, logits: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """Add the gradient of the z-loss (arXiv 2202.08906, equation 5): the mean over the whole row's tokens.

        Args:
            logits: [tokens of this rank, experts].
            padding_mask: bool [tokens of this rank], True on padding.

        Returns:
            The logits.
        """
        coefficient = self.config.moe_z_loss_coeff
        if coefficient is None or not self.training or not torch.is_grad_enabled():
            return logits
        values = logits.logsumexp(dim=-1).square()
        counted = torch.ones_like(values) if padding_mask is None else (~padding_mask).to(values.dtype)
        num_tokens = counted.sum()
        dist.all_reduce(num_tokens, group=self.tp_cp_group)
        share = (values * counted).sum() / num_tokens.clamp(min=1)
        scaled: Tensor = MoEAuxLossAutoScaler.apply(logits, coefficient * share)
        return scaled
