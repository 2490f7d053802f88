"""The contrastive loss against a loop over queries and passages."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megatron_grit.losses.contrastive import contrastive_accuracy, contrastive_loss


def unit_vectors(num_vectors: int, width: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(num_vectors, width, generator=generator, dtype=torch.float64)
    return torch.nn.functional.normalize(vectors, dim=-1)


def loop_loss(queries: Tensor, passages: Tensor, temperature: float, group_size: int) -> float:
    """The equation, in plain Python floats."""
    total = 0.0
    for i, query in enumerate(queries.tolist()):
        scores = [sum(a * b for a, b in zip(query, p, strict=True)) / temperature for p in passages.tolist()]
        largest = max(scores)
        total += largest + math.log(sum(math.exp(s - largest) for s in scores)) - scores[i * group_size]
    return total / len(queries)


@pytest.mark.parametrize("group_size", [1, 2, 3, 4])
@pytest.mark.parametrize("temperature", [0.02, 1.0])
def test_equals_loop(group_size: int, temperature: float) -> None:
    queries, passages = unit_vectors(5, 8, seed=group_size), unit_vectors(5 * group_size, 8, seed=10 + group_size)
    loss = contrastive_loss(queries.float(), passages.float(), temperature, group_size)
    assert loss.dtype is torch.float32
    assert loss.item() == pytest.approx(loop_loss(queries, passages, temperature, group_size), rel=1e-5)


@pytest.mark.parametrize("group_size", [1, 2, 4])
def test_gradient_equals_closed_form(group_size: int) -> None:
    """d loss / d s = (softmax - one hot) / Q, so the gradient of a query is that, times the passages, / temperature."""
    queries, passages = unit_vectors(6, 8, seed=1), unit_vectors(6 * group_size, 8, seed=2)
    queries.requires_grad_()
    contrastive_loss(queries, passages, 0.1, group_size).backward()
    with torch.no_grad():
        residual = torch.softmax(queries @ passages.T / 0.1, dim=1)
        for i in range(6):
            residual[i, i * group_size] -= 1
        expected = residual @ passages / 0.1 / 6
    assert queries.grad is not None
    torch.testing.assert_close(queries.grad, expected, rtol=1e-4, atol=1e-5)


def test_positive_is_the_first_of_its_group() -> None:
    """Each query equals one passage; only where that is the first of its group is the loss near 0."""
    passages = unit_vectors(12, 16, seed=3).float()
    at_positive = contrastive_loss(passages[0::3], passages, 0.02, group_size=3)
    at_negative = contrastive_loss(passages[1::3], passages, 0.02, group_size=3)
    assert at_positive < 1e-3 and at_negative > 5.0
    assert contrastive_accuracy(passages[0::3], passages, group_size=3) == 1.0
    assert contrastive_accuracy(passages[1::3], passages, group_size=3) == 0.0


def test_passages_of_other_queries_are_negatives() -> None:
    """Without them the loss would be that of a choice among G."""
    queries, passages = torch.zeros(7, 4), torch.zeros(14, 4)
    assert contrastive_loss(queries, passages, 0.02, group_size=2).item() == pytest.approx(math.log(14))


def test_bf16_embeddings_are_compared_in_fp32() -> None:
    queries, passages = unit_vectors(32, 64, seed=4).bfloat16(), unit_vectors(32, 64, seed=5).bfloat16()
    expected = loop_loss(queries.double(), passages.double(), 0.02, 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = contrastive_loss(queries, passages, 0.02, group_size=1)
    assert loss.dtype is torch.float32
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_accuracy_equals_loop_and_a_tie_is_a_miss() -> None:
    passages = unit_vectors(80, 16, seed=7).float()
    queries = passages[::2] + unit_vectors(40, 16, seed=6).float()
    hits = [int((queries[i] @ passages.T).argmax()) == 2 * i for i in range(40)]
    assert 0 < sum(hits) < 40
    assert contrastive_accuracy(queries, passages, group_size=2).item() == pytest.approx(sum(hits) / 40)
    assert contrastive_accuracy(torch.ones(3, 2), torch.ones(6, 2), group_size=2) == 0.0


@pytest.mark.parametrize(("num_queries", "num_passages", "group_size"), [(3, 5, 2), (3, 3, 0), (0, 0, 1)])
def test_shapes_that_do_not_fit(num_queries: int, num_passages: int, group_size: int) -> None:
    with pytest.raises(ValueError, match="passages"):
        contrastive_loss(torch.zeros(num_queries, 4), torch.zeros(num_passages, 4), 0.02, group_size)
