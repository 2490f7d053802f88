"""The contrastive loss of GRIT over a global batch of embeddings, and its usual variants.

Shape suffix legend: Q = queries of the global batch, P = their passages (Q x G), G = passages of a query, D = width,
A = anchors, K = candidates, C = anchors of one chunk.

Passages are laid out query by query, the positive of each first: passage i * G is the positive of query i, passages
i * G + 1 to i * G + G - 1 are its negatives.

Similarities are computed for a chunk of anchors at a time, and the gradient with them, so that the matrix of all
similarities is never in memory: 65,536 queries with as many passages would take 16 GiB, and as much again for its
gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_ELEMENTS = 1 << 24
"""Similarities that are held at once: 64 MiB in fp32."""


@dataclass(frozen=True, kw_only=True)
class ContrastiveOptions:
    """Which texts an anchor is compared with."""

    temperature: float
    """Divides the similarities."""
    group_size: int
    """G."""
    symmetric: bool = False
    """Also find the query of each positive, and take the mean of both directions."""
    negatives: Literal["batch", "hard"] = "batch"
    """batch: every passage of the batch; hard: those of the query's own group only."""
    same_side_negatives: bool = False
    """Other queries are negatives of a query too (and, in a symmetric loss, other positives of a positive)."""
    false_negative_margin: float | None = None
    """Leave out a negative that is more similar to its anchor than the positive is by more than this."""
    matryoshka_dims: tuple[int, ...] = ()
    """Also train the first so many channels, normalised anew: the mean over all sizes (arXiv 2205.13147)."""


def contrastive_loss(
    queries_QD: Tensor, passages_PD: Tensor, options: ContrastiveOptions, text_ids: Tensor | None = None
) -> Tensor:
    """Mean over queries of the cross-entropy of finding the positive among the candidates.

    With s(i, j) = <q_i, p_j> / temperature, the loss of GRIT (arXiv 2402.09906, equation 1) is

        mean over i of ( log sum_j exp s(i, j) - s(i, i * G) )

    where j runs over all P passages, so that each passage of another query is a negative too. Nothing is normalised
    here, but for shortened embeddings: give unit vectors for cosine similarity.

    Args:
        queries_QD: query embeddings of the global batch, any floating type.
        passages_PD: passage embeddings, P = Q x G, in the layout above.
        options: which texts an anchor is compared with.
        text_ids: int64 [Q + P], equal for equal texts, queries first. A candidate with the text of the positive, or of
            the anchor itself, is left out of the negatives. None: nothing is.

    Returns:
        Scalar in nats. Similarities and softmax are computed in fp32, or in fp64 for embeddings in fp64.

    Raises:
        ValueError: the shapes do not fit the layout, or there are not so many channels.
    """
    _check_shapes(queries_QD, passages_PD, options.group_size)
    width = queries_QD.shape[1]
    if any(not 0 < size <= width for size in options.matryoshka_dims):
        raise ValueError(f"embeddings have {width} channels; matryoshka_dims are {options.matryoshka_dims}")
    queries_QD, passages_PD = _full_precision(queries_QD), _full_precision(passages_PD)
    losses = [_loss(queries_QD, passages_PD, options, text_ids)]
    for size in options.matryoshka_dims:
        if size < width:
            queries, passages = (F.normalize(texts[:, :size], dim=-1) for texts in (queries_QD, passages_PD))
            losses.append(_loss(queries, passages, options, text_ids))
    return torch.stack(losses).mean()


def _loss(queries_QD: Tensor, passages_PD: Tensor, options: ContrastiveOptions, text_ids: Tensor | None) -> Tensor:
    num_queries, group_size = len(queries_QD), options.group_size
    first_Q = torch.arange(num_queries, device=queries_QD.device) * group_size
    ids_Q, ids_P = (None, None) if text_ids is None else text_ids.split((num_queries, len(passages_PD)))
    if options.negatives == "hard":
        return _hard_loss(queries_QD, passages_PD.view(num_queries, group_size, -1), ids_Q, ids_P, options)
    directions = [_direction(queries_QD, passages_PD, first_Q, queries_QD, ids_Q, ids_P, ids_Q, options)]
    if options.symmetric:
        positives_QD = passages_PD[first_Q]
        ids = None if ids_P is None else ids_P[first_Q]
        every = torch.arange(num_queries, device=queries_QD.device)
        directions.append(_direction(positives_QD, queries_QD, every, positives_QD, ids, ids_Q, ids, options))
    return torch.stack(directions).mean()


def _direction(
    anchors_AD: Tensor,
    candidates_KD: Tensor,
    targets_A: Tensor,
    same_side_AD: Tensor,
    anchor_ids: Tensor | None,
    candidate_ids: Tensor | None,
    same_side_ids: Tensor | None,
    options: ContrastiveOptions,
) -> Tensor:
    """Cross-entropy of finding candidate ``targets_A`` among all, and among the other anchors where they count too."""
    num_others = 0
    if options.same_side_negatives:
        num_others = len(same_side_AD)
        candidates_KD = torch.cat((candidates_KD, same_side_AD))
        if candidate_ids is not None and same_side_ids is not None:
            candidate_ids = torch.cat((candidate_ids, same_side_ids))
    arguments = (targets_A, anchor_ids, candidate_ids, num_others, options.temperature, options.false_negative_margin)
    loss: Tensor = _ChunkedCrossEntropy.apply(anchors_AD, candidates_KD, *arguments)
    return loss


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy over anchors; the gradient is computed with the loss, a chunk of anchors at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        anchors_AD: Tensor,
        candidates_KD: Tensor,
        targets_A: Tensor,
        anchor_ids: Tensor | None,
        candidate_ids: Tensor | None,
        num_others: int,
        temperature: float,
        margin: float | None,
    ) -> Tensor:
        """``num_others``: that many candidates at the end are the anchors themselves."""
        needs_gradient = any(ctx.needs_input_grad[:2])
        num_anchors, num_candidates = len(anchors_AD), len(candidates_KD)
        total = anchors_AD.new_zeros(())
        gradient_AD = torch.empty_like(anchors_AD) if needs_gradient else None
        gradient_KD = torch.zeros_like(candidates_KD) if needs_gradient else None
        step = max(1, CHUNK_ELEMENTS // num_candidates)
        # Autocast would put these products back into bf16, where cosines near 1 differ by no less than 0.004.
        with torch.autocast(anchors_AD.device.type, enabled=False):
            for start in range(0, num_anchors, step):
                chunk = slice(start, min(start + step, num_anchors))
                targets_C1 = targets_A[chunk, None]
                logits_CK = anchors_AD[chunk] @ candidates_KD.T
                left_out_CK = _left_out(logits_CK, chunk, targets_C1, anchor_ids, candidate_ids, num_others, margin)
                logits_CK /= temperature
                if left_out_CK is not None:
                    logits_CK.masked_fill_(left_out_CK, -torch.inf)
                log_sums_C1 = logits_CK.logsumexp(dim=1, keepdim=True)
                total += (log_sums_C1 - logits_CK.gather(1, targets_C1)).sum()
                if gradient_AD is not None and gradient_KD is not None:
                    residual_CK = logits_CK.sub_(log_sums_C1).exp_()
                    residual_CK.scatter_add_(1, targets_C1, -torch.ones_like(log_sums_C1))
                    residual_CK /= temperature * num_anchors
                    gradient_AD[chunk] = residual_CK @ candidates_KD
                    gradient_KD.addmm_(residual_CK.T, anchors_AD[chunk])
        if gradient_AD is not None and gradient_KD is not None:
            ctx.save_for_backward(gradient_AD, gradient_KD)
        return total / num_anchors

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        gradient_AD, gradient_KD = ctx.saved_tensors
        return gradient_AD * gradient, gradient_KD * gradient, None, None, None, None, None, None


def _left_out(
    similarities_CK: Tensor,
    chunk: slice,
    targets_C1: Tensor,
    anchor_ids: Tensor | None,
    candidate_ids: Tensor | None,
    num_others: int,
    margin: float | None,
) -> Tensor | None:
    """bool [C, K]: candidates that are no negatives of an anchor; never its positive. None: there are none."""
    if margin is None and candidate_ids is None and not num_others:
        return None
    left_out_CK = torch.zeros_like(similarities_CK, dtype=torch.bool)
    if margin is not None:
        left_out_CK |= similarities_CK > similarities_CK.gather(1, targets_C1) + margin
    if candidate_ids is not None and anchor_ids is not None:
        left_out_CK |= candidate_ids == candidate_ids[targets_C1]
        left_out_CK |= candidate_ids == anchor_ids[chunk, None]
    if num_others:
        itself_C1 = torch.arange(chunk.start, chunk.stop, device=similarities_CK.device)[:, None]
        left_out_CK.scatter_(1, itself_C1 + similarities_CK.shape[1] - num_others, True)
    return left_out_CK.scatter_(1, targets_C1, False)


def _hard_loss(
    queries_QD: Tensor,
    groups_QGD: Tensor,
    ids_Q: Tensor | None,
    ids_P: Tensor | None,
    options: ContrastiveOptions,
) -> Tensor:
    with torch.autocast(queries_QD.device.type, enabled=False):
        similarities_QG = torch.einsum("qd,qgd->qg", queries_QD, groups_QGD)
    left_out_QG = torch.zeros_like(similarities_QG, dtype=torch.bool)
    if options.false_negative_margin is not None:
        left_out_QG |= similarities_QG > similarities_QG[:, :1] + options.false_negative_margin
    if ids_Q is not None and ids_P is not None:
        ids_QG = ids_P.view_as(similarities_QG)
        left_out_QG |= (ids_QG == ids_QG[:, :1]) | (ids_QG == ids_Q[:, None])
    left_out_QG[:, 0] = False
    logits_QG = (similarities_QG / options.temperature).masked_fill(left_out_QG, -torch.inf)
    return -logits_QG.log_softmax(dim=1)[:, 0].mean()


@torch.no_grad()
def contrastive_accuracy(queries_QD: Tensor, passages_PD: Tensor, group_size: int) -> Tensor:
    """Share of the queries whose positive is more similar than every other passage of the batch.

    A tie counts as a miss, so that embeddings that are all alike score 0 and not 1.

    Args:
        queries_QD: as in :func:`contrastive_loss`.
        passages_PD: as in :func:`contrastive_loss`.
        group_size: G.

    Returns:
        fp32 scalar in [0, 1].

    Raises:
        ValueError: the shapes do not fit the layout.
    """
    _check_shapes(queries_QD, passages_PD, group_size)
    hits = torch.zeros((), device=queries_QD.device)
    step = max(1, CHUNK_ELEMENTS // len(passages_PD))
    passages_PD = passages_PD.float()
    with torch.autocast(queries_QD.device.type, enabled=False):
        for start in range(0, len(queries_QD), step):
            similarities_CP = queries_QD[start : start + step].float() @ passages_PD.T
            targets_C1 = (torch.arange(len(similarities_CP), device=hits.device) + start)[:, None] * group_size
            positives_C1 = similarities_CP.gather(1, targets_C1)
            others_CP = similarities_CP.scatter_(1, targets_C1, -torch.inf)
            hits += (positives_C1 > others_CP).all(dim=1).sum()
    return hits / len(queries_QD)


def _full_precision(texts_ND: Tensor) -> Tensor:
    return texts_ND if texts_ND.dtype is torch.float64 else texts_ND.float()


def _check_shapes(queries_QD: Tensor, passages_PD: Tensor, group_size: int) -> None:
    num_queries, num_passages = len(queries_QD), len(passages_PD)
    if group_size < 1 or num_queries == 0 or num_passages != num_queries * group_size:
        raise ValueError(
            f"{num_queries} queries with {group_size} passages each need {num_queries * group_size} passages, "
            f"not {num_passages}"
        )
