"""The contrastive loss and its accuracy once more, anchor by anchor, and what a teacher adds; see plain_model.py."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_grit.config.schema import LossConfig
from megatron_grit.config.schema.teacher import TeacherConfig
from megatron_grit.data.rows.batch import PackedRow


def contrastive(
    texts: Tensor,
    tokens: list[tuple[int, ...]],
    num_queries: int,
    group_size: int,
    knobs: LossConfig,
    distances: list[float],
) -> Tensor:
    sizes = [size for size in knobs.matryoshka_dims if size < texts.shape[1]]
    every = [texts] + [texts[:, :size] / texts[:, :size].norm(dim=1, keepdim=True) for size in sizes]
    queries = list(range(num_queries))
    passages = list(range(num_queries, len(texts)))
    positives = passages[::group_size]

    def direction(embeddings: Tensor, anchors: list[int], targets: list[int], candidates: list[int]) -> Tensor:
        losses = []
        for anchor, target in zip(anchors, targets, strict=True):
            own = passages[(target - num_queries) // group_size * group_size :][:group_size]
            among = own if knobs.negatives == "hard" else candidates
            others = [other for other in anchors if other != anchor] if knobs.same_side_negatives else []
            similarity = embeddings @ embeddings[anchor]
            kept = [target]
            for other in [each for each in among if each != target] + others:
                if knobs.mask_equal_texts and tokens[other] in (tokens[target], tokens[anchor]):
                    continue
                if knobs.false_negative_margin is not None:
                    above = float((similarity[other] - similarity[target]).detach()) - knobs.false_negative_margin
                    distances.append(abs(above))
                    if above > 0:
                        continue
                kept.append(other)
            scores = similarity[kept] / knobs.temperature
            losses.append(scores.logsumexp(0) - scores[0])
        return torch.stack(losses).mean()

    losses = [direction(embeddings, queries, positives, passages) for embeddings in every]
    if knobs.symmetric:
        losses += [direction(embeddings, positives, queries, queries) for embeddings in every]
    return torch.stack(losses).mean()


def accuracy(texts: Tensor, num_queries: int, group_size: int) -> tuple[float, float]:
    """Share of queries whose positive is the most similar passage, and by how much it comes nearest to being wrong."""
    similar = texts[:num_queries] @ texts[num_queries:].T
    positive = torch.arange(num_queries) * group_size
    others = similar.scatter(1, positive[:, None], -torch.inf).max(1).values
    ahead = similar.gather(1, positive[:, None])[:, 0] - others
    return float((ahead > 0).double().mean()), float(ahead.abs().min())


def teacher_losses(logits: Tensor, teacher: Tensor | None, row: PackedRow, knobs: TeacherConfig) -> Tensor:
    """What ``loss.teacher`` adds to the loss of each token of a row, in plain torch: [T].

    Args:
        logits: [T, V].
        teacher: the teacher's. None: what the row has of a cache.
        row: with labels.
        knobs: the section.
    """
    if knobs.kind == "gold":
        assert teacher is not None and row.labels_1T is not None
        own, other = (each.log_softmax(1).gather(1, row.labels_1T.T)[:, 0] for each in (logits, teacher))
        return own - other
    q = (logits / knobs.temperature).softmax(1)
    if teacher is not None:
        p = (teacher / knobs.temperature).softmax(1)
    else:
        assert row.teacher_ids_TK is not None and row.teacher_log_probs_TK1 is not None
        ids = row.teacher_ids_TK.long()
        p = row.teacher_log_probs_TK1.double().exp()
        chosen = q.gather(1, ids.clamp(min=0))
        q = torch.cat((chosen, 1 - chosen.sum(1, keepdim=True)), 1)
        nothing = ids[:, :1] < 0
        p, q = (torch.where(nothing, 1 / q.shape[1], each) for each in (p, q))
    first, second = (q, p) if knobs.direction == "reverse" else (p, q)
    return knobs.temperature**2 * (first * (first.log() - second.log())).sum(1)
