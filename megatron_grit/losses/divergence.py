"""Divergence of next-token distributions from a teacher's, over a vocabulary that tensor parallel ranks share.

Each rank has the logits of its own part of the vocabulary. What ranks exchange is one number a token at a time (the
largest logit, sums of exponentials, the expectation), never logits. Loss and gradient are computed together, a chunk of
tokens at a time, so that beside the logits there is one matrix of their size: the gradient.

With p the teacher's distribution, q the model's, both of logits / temperature, the divergence is

    forward: temperature^2 sum p (log p - log q)        reverse: temperature^2 sum q (log q - log p)

The factor keeps the size of the gradient where the temperature is changed (arXiv 1503.02531, section 2).

Shape suffix legend: L = tokens, C = tokens of one chunk, V = the part of the vocabulary that this rank holds, K = the
teacher's most probable tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_grit.config.workload import LOGITS_AT_ONCE

CHUNK_ELEMENTS = LOGITS_AT_ONCE


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """Which divergence, and who shares the vocabulary."""

    is_reverse: bool = False
    """KL(model || teacher) in place of KL(teacher || model)."""
    temperature: float = 1.0
    """Divides the logits of both."""
    group: dist.ProcessGroup | None = None
    """Tensor parallel ranks. None: this process has the whole vocabulary."""
    first_id: int = 0
    """Token of the first logit of this rank."""


def full_divergence(logits_LV: Tensor, teacher_logits_LV: Tensor, options: Divergence) -> Tensor:
    """Divergence over the whole vocabulary. Collective over the ranks that share it.

    Args:
        logits_LV: the model's, any floating type.
        teacher_logits_LV: the teacher's; they get no gradient.
        options: see there.

    Returns:
        fp32 [L] in nats, fp64 for logits in fp64; the same on all ranks.

    Raises:
        ValueError: the shapes differ.
    """
    if logits_LV.shape != teacher_logits_LV.shape:
        raise ValueError(
            f"logits {list(logits_LV.shape)} and teacher's {list(teacher_logits_LV.shape)} differ in shape"
        )

    def compare(log_q_CV: Tensor, chunk: slice) -> tuple[Tensor, Tensor]:
        log_p_CV = log_probabilities(teacher_logits_LV[chunk], options)
        q_CV, log_ratio_CV = log_q_CV.exp(), log_q_CV - log_p_CV
        if options.is_reverse:
            # Rows that pad the vocabulary have no probability, and 0 x inf is not a number.
            terms_CV = torch.where(q_CV > 0, q_CV * log_ratio_CV, 0.0)
            loss_C = _sum(terms_CV.sum(1), options)
            return loss_C, terms_CV - q_CV * loss_C[:, None]
        p_CV = log_p_CV.exp()
        return _sum(-torch.where(p_CV > 0, p_CV * log_ratio_CV, 0.0).sum(1), options), q_CV - p_CV

    found: Tensor = _ChunkedDivergence.apply(logits_LV, compare, options)
    return found


def bucket_divergence(logits_LV: Tensor, ids_LK: Tensor, log_probs_LK1: Tensor, options: Divergence) -> Tensor:
    """Divergence of distributions over K + 1 buckets: the teacher's K most probable tokens, and all others together.

    It is at most the divergence over the whole vocabulary, and less by temperature^2 x the probability of all others
    (the teacher's if forward, the model's if reverse) x the divergence within them (chain rule of relative entropy).
    Collective over the ranks that share the vocabulary.

    Args:
        logits_LV: the model's, any floating type.
        ids_LK: int64, the teacher's most probable tokens; -1 in the first column: not known, the divergence is 0.
        log_probs_LK1: their log-probabilities at the temperature, and that of all others, of any floating type.
        options: see there.

    Returns:
        As :func:`full_divergence`.

    Raises:
        ValueError: the shapes do not fit each other.
    """
    if len(logits_LV) != len(ids_LK) or log_probs_LK1.shape != (len(ids_LK), ids_LK.shape[1] + 1):
        raise ValueError(
            f"logits {list(logits_LV.shape)}, ids {list(ids_LK.shape)} and log-probabilities "
            f"{list(log_probs_LK1.shape)} do not fit each other"
        )
    width = logits_LV.shape[1]

    def compare(log_q_CV: Tensor, chunk: slice) -> tuple[Tensor, Tensor]:
        local_CK = ids_LK[chunk] - options.first_id
        inside_CK = (local_CK >= 0) & (local_CK < width)
        place_CK = torch.where(inside_CK, local_CK, width)  # a column for the tokens of other ranks
        own_CK = torch.where(inside_CK, log_q_CV.gather(1, local_CK.clamp(0, width - 1)), 0.0)
        log_q_CK = _sum(own_CK, options)
        log_others_CV = _with_column(log_q_CV).scatter(1, place_CK, -torch.inf)[:, :width]
        log_others_C1 = log_total(log_others_CV, options)
        log_q_CB = torch.cat((log_q_CK, log_others_C1), 1)
        log_p_CB = log_probs_LK1[chunk].to(log_q_CB.dtype)
        q_CB, p_CB, log_ratio_CB = log_q_CB.exp(), log_p_CB.exp(), log_q_CB - log_p_CB
        # By buckets the gradient is q - p, or q (log q - log p - loss). Within the last it is shared out by q.
        if options.is_reverse:
            terms_CB = torch.where(q_CB > 0, q_CB * log_ratio_CB, 0.0)
            loss_C = terms_CB.sum(1)
            buckets_CB = terms_CB - q_CB * loss_C[:, None]
        else:
            loss_C = -torch.where(p_CB > 0, p_CB * log_ratio_CB, 0.0).sum(1)
            buckets_CB = q_CB - p_CB
        share_CV = (log_others_CV - _finite(log_others_C1)).exp()
        gradient_CV = _with_column(share_CV * buckets_CB[:, -1:]).scatter(1, place_CK, buckets_CB[:, :-1])[:, :width]
        known_C = ids_LK[chunk, 0] >= 0
        return torch.where(known_C, loss_C, 0.0), torch.where(known_C[:, None], gradient_CV, 0.0)

    found: Tensor = _ChunkedDivergence.apply(logits_LV, compare, options)
    return found


class _ChunkedDivergence(torch.autograd.Function):
    """Calls a comparison for a chunk of tokens at a time, and keeps the gradient that it gives.

    The comparison takes log q [C, V] and which tokens they are; it returns the divergence / temperature^2, [C], and its
    gradient with respect to logits / temperature, [C, V].
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits_LV: Tensor,
        compare: Callable[[Tensor, slice], tuple[Tensor, Tensor]],
        options: Divergence,
    ) -> Tensor:
        """Divergences [L]."""
        num_tokens, width = logits_LV.shape
        losses_L = torch.zeros(num_tokens, dtype=_exact(logits_LV), device=logits_LV.device)
        gradient_LV = torch.empty_like(logits_LV) if ctx.needs_input_grad[0] else None
        step = max(1, CHUNK_ELEMENTS // width)
        for start in range(0, num_tokens, step):
            chunk = slice(start, start + step)
            losses_L[chunk], gradient_CV = compare(log_probabilities(logits_LV[chunk], options), chunk)
            if gradient_LV is not None:
                gradient_LV[chunk] = gradient_CV * options.temperature
        ctx.save_for_backward(gradient_LV)
        return losses_L * options.temperature**2

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient_LV,) = ctx.saved_tensors
        return gradient_LV * gradients[0][:, None].to(gradient_LV.dtype), None, None


def _exact(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype is torch.float64 else torch.float32


def log_probabilities(logits_CV: Tensor, options: Divergence) -> Tensor:
    """Logarithms of the probabilities at the temperature: fp32 [C, V], fp64 for logits in fp64. Collective over the
    ranks that share the vocabulary."""
    scaled_CV = logits_CV.to(_exact(logits_CV)) / options.temperature
    largest_C1 = scaled_CV.amax(1, keepdim=True)
    if options.group is not None:
        dist.all_reduce(largest_C1, op=dist.ReduceOp.MAX, group=options.group)
    scaled_CV = scaled_CV - largest_C1
    return scaled_CV - _sum(scaled_CV.exp().sum(1, keepdim=True), options).log()


def log_total(values_CV: Tensor, options: Divergence) -> Tensor:
    """Logarithm of what all probabilities add up to whose logarithms are given, also where the probabilities are too
    small for a number: [C, 1], -inf where there are none. Collective over the ranks that share the vocabulary."""
    largest_C1 = values_CV.amax(1, keepdim=True)
    if options.group is not None:
        dist.all_reduce(largest_C1, op=dist.ReduceOp.MAX, group=options.group)
    largest_C1 = _finite(largest_C1)
    return largest_C1 + _sum((values_CV - largest_C1).exp().sum(1, keepdim=True), options).log()


def _finite(logarithms: Tensor) -> Tensor:
    return logarithms.clamp(min=torch.finfo(logarithms.dtype).min)


def _sum(values: Tensor, options: Divergence) -> Tensor:
    """Over the ranks that share the vocabulary."""
    if options.group is not None:
        dist.all_reduce(values, group=options.group)
    return values


def _with_column(values_CV: Tensor) -> Tensor:
    return torch.cat((values_CV, values_CV.new_zeros(len(values_CV), 1)), 1)
