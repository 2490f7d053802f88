"""The next-token loss, divided by counts of the global batch.

Shape suffix legend: T = tokens of a packed row.

Each function call sees one row. What it returns is that row's share, and the sum of the shares over all rows of the
global batch, whichever rank and micro-batch they are in, is the loss. Counts of the global batch are known before
the step begins, so no mean of means enters where rows differ in length.
"""

from __future__ import annotations

import torch
from torch import Tensor

KINDS = ("token", "mixed", "sequence", "microbatch_mean", "sum")


def next_token_loss(
    token_losses_T: Tensor,
    loss_mask_T: Tensor,
    kind: str,
    *,
    num_loss_tokens: float,
    num_groups: int,
    group_sizes_T: Tensor | None = None,
) -> Tensor:
    """One row's share of the global batch's next-token loss.

    token: sum over labels / ``num_loss_tokens``: each label counts the same, however rows are cut.
    sequence, sum: sum over labels / ``num_groups``: each label counts the same and long answers weigh more in the total
    (groups of one sequence: GritLM's "token"). mixed: the row's mean / ``num_groups``, the number of rows: a mean of
    means, as GritLM's "mixed" takes over micro-batches, and like it dependent on which sequences share a row (GRIT,
    arXiv 2402.09906, equation 2 and appendix). microbatch_mean: each label's loss / the labels of its group, and /
    ``num_groups``: a mean of means over groups that do not depend on rows.

    Args:
        token_losses_T: cross-entropy of each position in nats, any shape.
        loss_mask_T: same shape; weight of each label, 0 where there is none.
        kind: one of :data:`KINDS`.
        num_loss_tokens: labels of the global batch, each counted by its weight.
        num_groups: of sequences or rows in the global batch.
        group_sizes_T: same shape, for microbatch_mean: labels of the group that a position belongs to, by weight.

    Returns:
        fp32 scalar; 0, with a gradient of zeros, for a row without labels.

    Raises:
        ValueError: unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind of next-token loss {kind!r}; one of {', '.join(KINDS)}")
    mask_T = loss_mask_T.float()
    # where, not a product: the loss of an unsupervised position may be infinite, and 0 x inf is not a number.
    shares_T = torch.where(mask_T > 0, token_losses_T.float() * mask_T, 0.0)
    if kind == "microbatch_mean":
        assert group_sizes_T is not None
        shares_T = torch.where(mask_T > 0, shares_T / group_sizes_T, 0.0)
    total = shares_T.sum()
    if kind == "token":
        return total / (num_loss_tokens or 1)
    if kind == "mixed":
        total = total / torch.where(mask_T.sum() > 0, mask_T.sum(), 1.0)
    return total / max(num_groups, 1)
