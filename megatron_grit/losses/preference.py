"""Losses of preferences: functions of the log-probabilities of answers under the model and under a reference.

Shape suffix legend: P = pairs, A = answers.

A loss is that of each pair, or of each rated answer, and none is divided by their number. Log-probabilities are those
of whole answers; what is taken a token is divided by ``num_tokens``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class PreferenceOptions:
    """Which loss, and its numbers."""

    loss: str = "dpo"
    beta: float = 0.1
    label_smoothing: float = 0.0
    gamma_beta_ratio: float = 0.0
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Answers:
    """Answers, preferred ones or others."""

    log_probs_A: Tensor
    """Under the model."""
    reference_A: Tensor
    """Under the reference; 0 where there is none."""
    num_tokens_A: Tensor
    """How many tokens each has."""

    @property
    def log_ratios_A(self) -> Tensor:
        """log p(answer) - log p_reference(answer)."""
        return self.log_probs_A - self.reference_A

    def per_token(self) -> Answers:
        """Both log-probabilities divided by the number of tokens."""
        return Answers(
            log_probs_A=self.log_probs_A / self.num_tokens_A,
            reference_A=self.reference_A / self.num_tokens_A,
            num_tokens_A=torch.ones_like(self.num_tokens_A),
        )

    def take(self, index: Tensor | slice) -> Answers:
        """Some of them."""
        return Answers(
            log_probs_A=self.log_probs_A[index],
            reference_A=self.reference_A[index],
            num_tokens_A=self.num_tokens_A[index],
        )


def pair_losses(chosen: Answers, rejected: Answers, options: PreferenceOptions) -> tuple[Tensor, Tensor, Tensor]:
    """Losses of pairs, without the next-token loss that may stand beside them.

    With r = log p - log p_reference of a preferred answer (+) and the other one (-), n their tokens and e the label
    smoothing:

    - dpo: -(1 - e) log s(h) - e log s(-h), h = beta (r+ - r-) (arXiv 2305.18290, equation 7; smoothing: cDPO,
      https://ericmitchell.ai/cdpo.pdf).
    - dpo_norm: the same with r / n in place of r (Tulu 3, arXiv 2411.15124, section 5.1).
    - ipo: (r+ / n+ - r- / n- - 1 / (2 beta))^2 (arXiv 2310.12036, equation 17).
    - simpo: as dpo with h = beta (log p+ / n+ - log p- / n- - gamma / beta) (arXiv 2405.14734, equation 6).
    - orpo: -beta log s(log odds+ - log odds-), odds = p / (1 - p) of p a token (arXiv 2403.07691, equation 7).

    Args:
        chosen: the preferred answer of each pair.
        rejected: the other one.
        options: which loss.

    Returns:
        Loss, reward of the preferred answer and of the other one, each [P]; rewards without a graph.

    Raises:
        ValueError: a loss that is not of pairs.
    """
    loss, beta = options.loss, options.beta
    if loss != "dpo":
        chosen, rejected = chosen.per_token(), rejected.per_token()
    if loss in ("dpo", "dpo_norm", "ipo"):
        first, second = chosen.log_ratios_A, rejected.log_ratios_A
    elif loss in ("simpo", "orpo"):
        first, second = chosen.log_probs_A, rejected.log_probs_A
    else:
        raise ValueError(f"{loss!r} is not a loss of pairs")
    difference = first - second
    if loss == "ipo":
        losses = (difference - 1 / (2 * beta)) ** 2
    elif loss == "orpo":
        losses = -beta * F.logsigmoid(difference - _log_complement(first) + _log_complement(second))
    else:
        margin = beta * (difference - (options.gamma_beta_ratio if loss == "simpo" else 0.0))
        losses = -(1 - options.label_smoothing) * F.logsigmoid(margin) - options.label_smoothing * F.logsigmoid(-margin)
    return losses, beta * first.detach(), beta * second.detach()


def rated_losses(
    answers: Answers, is_desirable_A: Tensor, kl: Tensor | float, options: PreferenceOptions
) -> tuple[Tensor, Tensor]:
    """KTO (arXiv 2402.01306, equation 7): 1 - s(beta (r - z)) of desirable answers and 1 - s(beta (z - r)) of others,
    each by its weight, where r = log p - log p_reference and z is an estimate of KL(p || p_reference).

    Args:
        answers: rated answers.
        is_desirable_A: bool.
        kl: z, at least 0, without a graph.
        options: beta and the two weights.

    Returns:
        Loss and reward of each answer, [A]; rewards without a graph.
    """
    ratios = answers.log_ratios_A
    sign = torch.where(is_desirable_A, 1.0, -1.0)
    weights = torch.where(is_desirable_A, options.desirable_weight, options.undesirable_weight)
    losses = weights * (1 - torch.sigmoid(options.beta * sign * (ratios - kl)))
    return losses, options.beta * ratios.detach()


def _log_complement(log_p: Tensor) -> Tensor:
    """log(1 - p)."""
    # Near p = 1 and near p = 0 one of two forms is exact; torch.where would put NaN into the gradient of the other.
    small = log_p < -0.6931471805599453
    low, high = torch.where(small, log_p, -1.0), torch.where(small, -1.0, log_p.clamp(max=-1e-12))
    return torch.where(small, torch.log1p(-low.exp()), torch.log(-torch.expm1(high)))
