"""Policy-gradient losses of sampled completions, divided by counts of the global batch: PPO's clipped objective as GRPO
and its variants use it.

Shape suffix legend: T = tokens of a packed row, S = its segments, each a prompt with one completion.

As in :mod:`~megatron_grit.losses.next_token` each call sees one row, what it returns is that row's share, and the sum
of the shares over the rows of the global batch is the loss.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class PolicyLoss:
    """Which loss it is; fields as of the section ``rollout``."""

    ratio: Literal["token", "sequence"] = "token"
    clip_low: float = 0.2
    clip_high: float = 0.2


@dataclass(frozen=True, kw_only=True)
class PolicyShares:
    """A row's share of the loss and of means over the tokens of the global batch's completions: fp32 scalars."""

    loss: Tensor
    """With a gradient."""
    ratio: Tensor
    """Probability ratio of the policy and the one that sampled; of a completion's with ``ratio`` sequence."""
    clipped: Tensor
    """1 where clipping takes the gradient away."""
    kl: Tensor
    """r - 1 - log r, an estimate of KL(sampling policy || policy) by ratios of tokens."""
    entropy: Tensor
    """-log p of the tokens: an estimate of the entropy of a policy that still is nearly the one that sampled them."""


def token_weights(
    mask_T: Tensor,
    aggregation: str,
    *,
    num_tokens: float,
    num_completions: int,
    sizes_T: Tensor,
    completion_tokens: int,
) -> Tensor:
    """What each token's loss is multiplied by, so that a sum over the global batch is the loss: fp32 [T].

    token: 1 / tokens (DAPO, arXiv 2503.14476, equation 8). sequence: 1 / (completions x tokens of the completion)
    (GRPO, arXiv 2402.03300, equation 3). constant: 1 / (completions x ``completion_tokens``) (Dr. GRPO, arXiv
    2503.20783, appendix).

    Args:
        mask_T: 1 on tokens that were sampled, else 0.
        aggregation: one of the three.
        num_tokens: sampled tokens of the global batch.
        num_completions: of the global batch.
        sizes_T: sampled tokens of the completion that each token belongs to; any positive number elsewhere.
        completion_tokens: a constant length.

    Raises:
        ValueError: unknown aggregation.
    """
    mask_T = mask_T.float()
    if aggregation == "token":
        return mask_T / max(num_tokens, 1)
    if aggregation == "sequence":
        return mask_T / (max(num_completions, 1) * sizes_T)
    if aggregation == "constant":
        return mask_T / (max(num_completions, 1) * completion_tokens)
    raise ValueError(f"unknown aggregation {aggregation!r}; one of token, sequence, constant")


def kl_to_reference(log_probs_T: Tensor, reference_T: Tensor) -> Tensor:
    """r - 1 - log r with r = reference / policy: an unbiased, positive estimate of KL(policy || reference) on tokens
    that the policy sampled (k3; GRPO, arXiv 2402.03300, equation 4). fp32 [T]."""
    away_T = reference_T - log_probs_T
    return torch.exp(away_T) - 1 - away_T


def policy_loss(
    log_probs_T: Tensor,
    behavior_T: Tensor,
    advantages_T: Tensor,
    weights_T: Tensor,
    mask_T: Tensor,
    options: PolicyLoss,
    *,
    num_tokens: float,
    segments_T: Tensor | None = None,
    sum_of_ranks: Callable[[Tensor], Tensor] | None = None,
) -> PolicyShares:  # many: what the formula has, of one row
    """One row's share of the clipped objective, -min(r A, clip(r, 1 - low, 1 + high) A) (PPO, arXiv 1707.06347,
    equation 7), with r a token's ratio, or exp of the mean log-ratio of its completion (GSPO, arXiv 2507.18071,
    equation 7).

    Args:
        log_probs_T: of the sampled tokens under the policy, with a gradient.
        behavior_T: the same under the policy that sampled them.
        advantages_T: of the completion that each token belongs to.
        weights_T: of :func:`token_weights`.
        mask_T: bool; sampled tokens that this context parallel rank holds.
        options: which loss.
        num_tokens: sampled tokens of the global batch.
        segments_T: int64; segment of each token, for ratios of sequences.
        sum_of_ranks: adds a tensor up over context parallel ranks, with the gradient of this rank's own terms. None:
            one rank holds the row.

    Returns:
        Shares. Where completions are cut over context parallel ranks and their ratios are joined, each rank has the
        loss of the whole row, with the gradient of its own tokens, and the means of its own tokens.
    """
    # where, not a product: what stands outside the mask may be infinite, or not a number.
    policy_T = torch.where(mask_T, log_probs_T.float(), 0.0)
    log_ratio_T = torch.where(mask_T, policy_T - behavior_T.float(), 0.0)
    if options.ratio == "sequence":
        assert segments_T is not None
        log_used_T, counted_T = _by_sequence(log_ratio_T, weights_T, mask_T, segments_T, sum_of_ranks)
    else:
        log_used_T, counted_T = log_ratio_T, torch.where(mask_T, weights_T, 0.0)
    ratio_T = torch.exp(log_used_T)
    clipped_T = ratio_T.clamp(1 - options.clip_low, 1 + options.clip_high)
    losses_T = -torch.minimum(ratio_T * advantages_T, clipped_T * advantages_T)
    total = torch.where(counted_T > 0, losses_T * counted_T, 0.0).sum()
    with torch.no_grad():
        low_T = (ratio_T < 1 - options.clip_low) & (advantages_T < 0)
        high_T = (ratio_T > 1 + options.clip_high) & (advantages_T > 0)
        means = [
            torch.where(mask_T, values_T.float(), 0.0).sum() / max(num_tokens, 1)
            for values_T in (ratio_T, low_T | high_T, torch.exp(log_ratio_T) - 1 - log_ratio_T, -policy_T)
        ]
    return PolicyShares(loss=total, ratio=means[0], clipped=means[1], kl=means[2], entropy=means[3])


def _by_sequence(
    log_ratio_T: Tensor,
    weights_T: Tensor,
    mask_T: Tensor,
    segments_T: Tensor,
    sum_of_ranks: Callable[[Tensor], Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """Each token's completion's mean log-ratio, and the weights of all tokens, those of other ranks included."""
    terms_2T = torch.stack((log_ratio_T, mask_T.float()))
    sums_2T = torch.zeros_like(terms_2T).index_add(1, segments_T, terms_2T)  # there are no more segments than tokens
    if sum_of_ranks is not None:
        sums_2T = sum_of_ranks(sums_2T)
    means_T = sums_2T[0] / sums_2T[1].detach().clamp(min=1)
    return means_T[segments_T], weights_T
