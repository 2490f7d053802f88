"""The focal loss (arXiv 1708.02002, equation 4) of next tokens: tokens that the model is sure of count for little."""

from __future__ import annotations

import torch
from torch import Tensor


def focal_loss(
    token_losses_T: Tensor, loss_mask_T: Tensor, gamma: float, num_loss_tokens: int
) -> tuple[Tensor, Tensor]:
    """One row's share of the loss, and of the share of tokens whose probability is above one half."""
    probabilities_T = torch.exp(-token_losses_T)
    shares_T = (1 - probabilities_T) ** gamma * token_losses_T * loss_mask_T
    easy = ((probabilities_T > 0.5) * loss_mask_T).sum()
    return shares_T.sum() / num_loss_tokens, easy / num_loss_tokens
