"""The contrastive loss of GRIT over a global batch of embeddings, and its usual variants.

Shape suffix legend: Q = queries of the global batch, P = their passages (Q x G), G = passages of a query, D = width,
A = anchors, K = candidates, C = anchors of one chunk.

Passages are laid out query by query, the positive of each first: passage i * G is the positive of query i, passages
i * G + 1 to i * G + G - 1 are its negatives.

Similarities are computed for a chunk of anchors at a time, and the gradient with them, so that the matrix of all
similarities is never in memory: 65,536 queries with as many passages would take 16 GiB, and as much again for its
gradient. The anchors may be sharded over ranks: the losses of all shards add up to the whole, and so do their
gradients.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_grit.config.workload import SIMILARITIES_AT_ONCE

CHUNK_ELEMENTS = SIMILARITIES_AT_ONCE


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
    num_blocks: int = 1
    """Number of blocks of consecutive queries that the batch is split into; the loss is the mean over them."""
    same_side_negatives: bool = False
    """Other queries are negatives of a query too (and, in a symmetric loss, other positives of a positive)."""
    false_negative_margin: float | None = None
    """Leave out a negative that is more similar to its anchor than the positive is by more than this."""
    matryoshka_dims: tuple[int, ...] = ()
    """Also train the first n channels, normalised again, for each n; the loss is their mean (arXiv 2205.13147)."""
    gradient_sides: Literal["both", "queries", "passages"] = "both"
    """queries or passages: stop the gradient through the embeddings of the other side."""


def contrastive_loss(
    queries_QD: Tensor,
    passages_PD: Tensor,
    options: ContrastiveOptions,
    text_ids: Tensor | None = None,
    anchors: slice | None = None,
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
        anchors: the terms of these queries only (and, in a symmetric loss, of their positives), from start to stop,
            still divided by Q. None: all.

    Returns:
        Scalar in nats. Similarities and softmax are computed in fp32, or in fp64 for embeddings in fp64.

    Raises:
        ValueError: the shapes do not fit the layout or the blocks, or an embedding has fewer channels than needed.
    """
    return contrastive_loss_and_accuracy(queries_QD, passages_PD, options, text_ids, anchors)[0]


def contrastive_loss_and_accuracy(
    queries_QD: Tensor,
    passages_PD: Tensor,
    options: ContrastiveOptions,
    text_ids: Tensor | None = None,
    anchors: slice | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`contrastive_loss` and :func:`contrastive_accuracy`, where possible from the same similarities.

    Args and Raises: see there.

    Returns:
        Loss, and the number of ``anchors`` that are hits divided by Q.
    """
    _check_shapes(queries_QD, passages_PD, options)
    width, anchors = queries_QD.shape[1], anchors or slice(0, len(queries_QD))
    queries_QD, passages_PD = _full_precision(queries_QD), _full_precision(passages_PD)
    if options.gradient_sides == "queries":
        passages_PD = passages_PD.detach()
    if options.gradient_sides == "passages":
        queries_QD = queries_QD.detach()
    whole, accuracy = _loss(queries_QD, passages_PD, options, text_ids, anchors)
    losses = [whole]
    for size in options.matryoshka_dims:
        if size < width:
            queries, passages = (F.normalize(texts[:, :size], dim=-1) for texts in (queries_QD, passages_PD))
            losses.append(_loss(queries, passages, options, text_ids, anchors)[0])
    if accuracy is None:
        accuracy = contrastive_accuracy(queries_QD, passages_PD, options.group_size, anchors)
    return torch.stack(losses).mean() if len(losses) > 1 else whole, accuracy


def _loss(
    queries_QD: Tensor, passages_PD: Tensor, options: ContrastiveOptions, text_ids: Tensor | None, anchors: slice
) -> tuple[Tensor, Tensor | None]:
    """Loss of the anchors, and their share of hits where every passage of the batch was looked at."""
    num_queries, group_size = len(queries_QD), options.group_size
    ids_Q, ids_P = (None, None) if text_ids is None else text_ids.split((num_queries, len(passages_PD)))
    if options.num_blocks > 1:
        return _blocks(queries_QD, passages_PD, options, ids_Q, ids_P, anchors), None
    if options.negatives == "hard":
        groups_QGD = passages_PD.view(num_queries, group_size, -1)
        return _hard_loss(queries_QD, groups_QGD, ids_Q, ids_P, options, anchors), None
    first_Q = torch.arange(num_queries, device=queries_QD.device) * group_size
    loss, hits = _direction(queries_QD, passages_PD, first_Q, ids_Q, ids_P, options, anchors)
    if options.symmetric:
        positives_QD = passages_PD[first_Q]
        ids = None if ids_P is None else ids_P[first_Q]
        every = torch.arange(num_queries, device=queries_QD.device)
        loss = (loss + _direction(positives_QD, queries_QD, every, ids, ids_Q, options, anchors)[0]) / 2
    return loss, hits


def _blocks(
    queries_QD: Tensor,
    passages_PD: Tensor,
    options: ContrastiveOptions,
    ids_Q: Tensor | None,
    ids_P: Tensor | None,
    anchors: slice,
) -> Tensor:
    """Mean over blocks, each as if it were the batch."""
    size = len(queries_QD) // options.num_blocks
    inner, total = replace(options, num_blocks=1), queries_QD.new_zeros(())
    blocks = zip(queries_QD.split(size), passages_PD.split(size * options.group_size), strict=True)
    for block, (queries, passages) in enumerate(blocks):
        start = block * size
        own = slice(max(anchors.start - start, 0), min(anchors.stop - start, size))
        ids = None
        if ids_Q is not None and ids_P is not None:
            ids = torch.cat((ids_Q[start:][:size], ids_P[start * options.group_size :][: len(passages)]))
        total = total + _loss(queries, passages, inner, ids, own)[0]
    return total / options.num_blocks


def _direction(
    anchors_AD: Tensor,
    candidates_KD: Tensor,
    targets_A: Tensor,
    anchor_ids: Tensor | None,
    candidate_ids: Tensor | None,
    options: ContrastiveOptions,
    anchors: slice,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of finding candidate ``targets_A`` among all, and among the other anchors where they count too."""
    num_others = 0
    if options.same_side_negatives:
        num_others = len(anchors_AD)
        candidates_KD = torch.cat((candidates_KD, anchors_AD))
        if candidate_ids is not None and anchor_ids is not None:
            candidate_ids = torch.cat((candidate_ids, anchor_ids))
    matching = _Matching(
        anchors=anchors,
        targets_A=targets_A,
        anchor_ids=anchor_ids,
        candidate_ids=candidate_ids,
        num_others=num_others,
        temperature=options.temperature,
        margin=options.false_negative_margin,
    )
    loss, hits = _ChunkedCrossEntropy.apply(anchors_AD, candidates_KD, matching)
    return loss, hits


@dataclass(frozen=True, kw_only=True)
class _Matching:
    """What each anchor is to find, and what counts against it."""

    anchors: slice
    """Those whose losses are computed."""
    targets_A: Tensor
    """The candidate that is an anchor's positive."""
    anchor_ids: Tensor | None
    candidate_ids: Tensor | None
    """Texts with equal ids are the same and no negatives of each other."""
    num_others: int
    """That many candidates at the end are the anchors themselves."""
    temperature: float
    margin: float | None
    """A candidate that is more similar than the positive by more than this is no negative. None: it is one."""


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Cross-entropy summed over anchors; the gradient is computed with the loss, a chunk of anchors at a time.

    With m the largest logit of the negatives, S = sum over them of exp(logit - m) and x = log S + m - logit of the
    positive, an anchor's loss is softplus(x), and its gradient with respect to the logits sigmoid(x) times -1 at the
    positive and exp(logit - m) / S elsewhere. Nothing cancels, so that small losses keep their relative precision.
    """

    @staticmethod
    def forward(ctx: Any, anchors_AD: Tensor, candidates_KD: Tensor, matching: _Matching) -> tuple[Tensor, Tensor]:
        """Loss and number of hits, each divided by the number of anchors."""
        anchors, temperature = matching.anchors, matching.temperature
        num_anchors, num_candidates = len(anchors_AD), len(candidates_KD)
        loss, hits = anchors_AD.new_zeros(()), anchors_AD.new_zeros(())
        gradient_AD = torch.zeros_like(anchors_AD) if ctx.needs_input_grad[0] else None
        gradient_KD = torch.zeros_like(candidates_KD) if ctx.needs_input_grad[1] else None
        step = max(1, CHUNK_ELEMENTS // num_candidates)
        buffer_CK = anchors_AD.new_empty(min(step, max(0, anchors.stop - anchors.start)), num_candidates)
        lowest, smallest = torch.finfo(anchors_AD.dtype).min, torch.finfo(anchors_AD.dtype).tiny
        # Autocast would put these products back into bf16, where cosines near 1 differ by no less than 0.004.
        with torch.autocast(anchors_AD.device.type, enabled=False):
            for start in range(anchors.start, anchors.stop, step):
                chunk = slice(start, min(start + step, anchors.stop))
                targets_C1 = matching.targets_A[chunk, None]
                anchors_CD = anchors_AD[chunk] / temperature
                logits_CK = torch.mm(anchors_CD, candidates_KD.T, out=buffer_CK[: len(anchors_CD)])
                positives_C1 = logits_CK.gather(1, targets_C1)
                left_out = _left_out(logits_CK, chunk, matching)
                logits_CK.scatter_(1, targets_C1, -torch.inf)
                largest_C1 = logits_CK[:, : num_candidates - matching.num_others].amax(1, keepdim=True)
                hits += (positives_C1 > largest_C1).sum()
                if left_out is not None:
                    largest_C1 = logits_CK.masked_fill_(left_out, -torch.inf).amax(1, keepdim=True)
                largest_C1.clamp_(min=lowest)  # an anchor without negatives
                weights_CK = logits_CK.sub_(largest_C1).exp_()
                sums_C1 = weights_CK.sum(1, keepdim=True)
                excess_C1 = sums_C1.log() + largest_C1 - positives_C1
                loss += torch.logaddexp(excess_C1, torch.zeros_like(excess_C1)).sum()
                weights_CK.scatter_(1, targets_C1, -sums_C1)
                scale_C1 = excess_C1.sigmoid_() / (sums_C1.clamp(min=smallest) * num_anchors)
                if gradient_AD is not None:
                    gradient_AD[chunk] = weights_CK @ candidates_KD * (scale_C1 / temperature)
                if gradient_KD is not None:
                    gradient_KD.addmm_(weights_CK.T, anchors_CD * scale_C1)
        ctx.save_for_backward(gradient_AD, gradient_KD)
        ctx.mark_non_differentiable(hits)
        return loss / num_anchors, hits / num_anchors

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        saved = (None if tensor is None else tensor * gradients[0] for tensor in ctx.saved_tensors)
        return *saved, None


def _left_out(logits_CK: Tensor, chunk: slice, matching: _Matching) -> Tensor | None:
    """bool [C, K]: candidates that are no negatives of an anchor; never its positive. None: there are none."""
    margin, num_others = matching.margin, matching.num_others
    anchor_ids, candidate_ids = matching.anchor_ids, matching.candidate_ids
    if margin is None and candidate_ids is None and not num_others:
        return None
    targets_C1 = matching.targets_A[chunk, None]
    left_out_CK = torch.zeros_like(logits_CK, dtype=torch.bool)
    if margin is not None:
        left_out_CK |= logits_CK > logits_CK.gather(1, targets_C1) + margin / matching.temperature
    if candidate_ids is not None and anchor_ids is not None:
        left_out_CK |= candidate_ids == candidate_ids[targets_C1]
        left_out_CK |= candidate_ids == anchor_ids[chunk, None]
    if num_others:
        itself_C1 = torch.arange(chunk.start, chunk.stop, device=logits_CK.device)[:, None]
        left_out_CK.scatter_(1, itself_C1 + logits_CK.shape[1] - num_others, True)
    return left_out_CK.scatter_(1, targets_C1, False)


def _hard_loss(
    queries_QD: Tensor,
    groups_QGD: Tensor,
    ids_Q: Tensor | None,
    ids_P: Tensor | None,
    options: ContrastiveOptions,
    anchors: slice,
) -> Tensor:
    with torch.autocast(queries_QD.device.type, enabled=False):
        similarities_AG = torch.einsum("ad,agd->ag", queries_QD[anchors], groups_QGD[anchors])
    left_out_AG = torch.zeros_like(similarities_AG, dtype=torch.bool)
    if options.false_negative_margin is not None:
        left_out_AG |= similarities_AG > similarities_AG[:, :1] + options.false_negative_margin
    if ids_Q is not None and ids_P is not None:
        ids_AG = ids_P.view(len(queries_QD), -1)[anchors]
        left_out_AG |= (ids_AG == ids_AG[:, :1]) | (ids_AG == ids_Q[anchors, None])
    left_out_AG[:, 0] = False
    logits_AG = (similarities_AG / options.temperature).masked_fill(left_out_AG, -torch.inf)
    return -logits_AG.log_softmax(dim=1)[:, 0].sum() / len(queries_QD)


@torch.no_grad()
def contrastive_accuracy(
    queries_QD: Tensor, passages_PD: Tensor, group_size: int, anchors: slice | None = None
) -> Tensor:
    """Share of the queries whose positive is more similar than every other passage of the batch.

    A tie counts as a miss, so that embeddings that are all alike score 0 and not 1.

    Args:
        queries_QD: as in :func:`contrastive_loss`.
        passages_PD: as in :func:`contrastive_loss`.
        group_size: G.
        anchors: count hits of these queries only, still divided by Q. None: all.

    Returns:
        Scalar in [0, 1].

    Raises:
        ValueError: the shapes do not fit the layout.
    """
    _check_shapes(queries_QD, passages_PD, ContrastiveOptions(temperature=1.0, group_size=group_size))
    queries_QD, passages_PD = _full_precision(queries_QD), _full_precision(passages_PD)
    hits = queries_QD.new_zeros(())
    anchors = anchors or slice(0, len(queries_QD))
    step = max(1, CHUNK_ELEMENTS // len(passages_PD))
    with torch.autocast(queries_QD.device.type, enabled=False):
        for start in range(anchors.start, anchors.stop, step):
            stop = min(start + step, anchors.stop)
            similarities_CP = queries_QD[start:stop] @ passages_PD.T
            targets_C1 = torch.arange(start, stop, device=hits.device)[:, None] * group_size
            positives_C1 = similarities_CP.gather(1, targets_C1)
            others_CP = similarities_CP.scatter_(1, targets_C1, -torch.inf)
            hits += (positives_C1 > others_CP.amax(1, keepdim=True)).sum()
    return hits / len(queries_QD)


def _full_precision(texts_ND: Tensor) -> Tensor:
    return texts_ND if texts_ND.dtype is torch.float64 else texts_ND.float()


def _check_shapes(queries_QD: Tensor, passages_PD: Tensor, options: ContrastiveOptions) -> None:
    (num_queries, width), num_passages, group_size = queries_QD.shape, len(passages_PD), options.group_size
    if group_size < 1 or num_queries == 0 or num_passages != num_queries * group_size:
        raise ValueError(
            f"{num_queries} queries with {group_size} passages each need {num_queries * group_size} passages, "
            f"not {num_passages}"
        )
    if num_queries % options.num_blocks:
        raise ValueError(f"{num_queries} queries cannot be cut into {options.num_blocks} blocks")
    if any(not 0 < size <= width for size in options.matryoshka_dims):
        raise ValueError(f"embeddings have {width} channels; matryoshka_dims are {options.matryoshka_dims}")
