"""The next-token loss, divided by counts of the global batch.

Shape suffix legend: T = tokens of a packed row.

Each function call sees one row. What it returns is that row's share, and the sum of the shares over all rows of the
global batch, whichever rank and micro-batch they are in, is the loss. Counts of the global batch are known before
the step begins, so no mean of means enters where rows differ in length.
"""

from __future__ import annotations

import torch
from torch import Tensor

KINDS = ("token", "mixed", "sequence")


def next_token_loss(
    token_losses_T: Tensor,
    loss_mask_T: Tensor,
    kind: str,
    *,
    num_loss_tokens: int,
    num_sequences: int,
    num_rows: int,
) -> Tensor:
    """One row's share of the global batch's next-token loss.

    token: sum over supervised tokens / ``num_loss_tokens``: each token counts the same, however rows are cut.
    sequence: sum / ``num_sequences``: each token counts the same and long answers weigh more in the total (GritLM's
    "token"). mixed: the row's mean / ``num_rows``: a mean of means, as GritLM's "mixed" takes over micro-batches, and
    like it dependent on which sequences share a row (GRIT, arXiv 2402.09906, equation 2 and appendix).

    Args:
        token_losses_T: cross-entropy of each position in nats, any shape.
        loss_mask_T: same shape; 1 where the label is supervised, 0 elsewhere.
        kind: one of :data:`KINDS`.
        num_loss_tokens: supervised tokens of the global batch.
        num_sequences: generative sequences of the global batch.
        num_rows: generative rows of the global batch.

    Returns:
        fp32 scalar; 0, with a gradient of zeros, for a row without supervised tokens.

    Raises:
        ValueError: unknown kind.
    """
    mask_T = loss_mask_T.float()
    # where, not a product: the loss of an unsupervised position may be infinite, and 0 x inf is not a number.
    total = torch.where(mask_T > 0, token_losses_T.float() * mask_T, 0.0).sum()
    if kind == "token":
        return total / max(num_loss_tokens, 1)
    if kind == "sequence":
        return total / max(num_sequences, 1)
    if kind == "mixed":
        return total / mask_T.sum().clamp(min=1.0) / max(num_rows, 1)
    raise ValueError(f"unknown kind of next-token loss {kind!r}; one of {', '.join(KINDS)}")
