"""The contrastive loss of GRIT over a global batch of embeddings.

Shape suffix legend: Q = queries of the global batch, P = their passages (Q x G), G = passages of a query, D = width.

Passages are laid out query by query, the positive of each first: passage i * G is the positive of query i, passages
i * G + 1 to i * G + G - 1 are its negatives.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def contrastive_loss(queries_QD: Tensor, passages_PD: Tensor, temperature: float, group_size: int) -> Tensor:
    """Mean over queries of the cross-entropy of finding the positive among all passages of the batch.

    With s(i, j) = <q_i, p_j> / temperature, the loss is

        mean over i of ( log sum_j exp s(i, j) - s(i, i * G) )

    where j runs over all P passages, so that each passage of another query is a negative too. One direction only, no
    term between queries or between passages (GRIT, arXiv 2402.09906, equation 1). Nothing is normalised here: give
    unit vectors for cosine similarity.

    Args:
        queries_QD: query embeddings of the global batch, any floating type.
        passages_PD: passage embeddings, P = Q x G, in the layout above.
        temperature: divides the similarities.
        group_size: G.

    Returns:
        fp32 scalar in nats; similarities and softmax are computed in fp32 whatever the type of the embeddings.

    Raises:
        ValueError: the shapes do not fit the layout.
    """
    similarities_QP = _similarities(queries_QD, passages_PD, group_size) / temperature
    return F.cross_entropy(similarities_QP, _targets(queries_QD, group_size))


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
    similarities_QP = _similarities(queries_QD, passages_PD, group_size)
    targets_Q1 = _targets(queries_QD, group_size)[:, None]
    positives_Q1 = similarities_QP.gather(1, targets_Q1)
    others_QP = similarities_QP.scatter(1, targets_Q1, -torch.inf)
    return (positives_Q1 > others_QP).all(dim=1).float().mean()


def _similarities(queries_QD: Tensor, passages_PD: Tensor, group_size: int) -> Tensor:
    num_queries, num_passages = len(queries_QD), len(passages_PD)
    if group_size < 1 or num_queries == 0 or num_passages != num_queries * group_size:
        raise ValueError(
            f"{num_queries} queries with {group_size} passages each need {num_queries * group_size} passages, "
            f"not {num_passages}"
        )
    # Autocast would put this product back into bf16, where cosines near 1 differ by no less than 0.004.
    with torch.autocast(queries_QD.device.type, enabled=False):
        return queries_QD.float() @ passages_PD.float().T


def _targets(queries_QD: Tensor, group_size: int) -> Tensor:
    return torch.arange(len(queries_QD), device=queries_QD.device) * group_size
