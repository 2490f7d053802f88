"""The contrastive loss against a loop over queries and passages."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_grit.losses import contrastive
from megatron_grit.losses.contrastive import ContrastiveOptions, contrastive_accuracy, contrastive_loss


def loss_of(
    queries: Tensor, passages: Tensor, temperature: float, group_size: int, text_ids: Tensor | None = None, **knobs: Any
) -> Tensor:
    options = ContrastiveOptions(temperature=temperature, group_size=group_size, **knobs)
    return contrastive_loss(queries, passages, options, text_ids)


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
    loss = loss_of(queries.float(), passages.float(), temperature, group_size)
    assert loss.dtype is torch.float32
    assert loss.item() == pytest.approx(loop_loss(queries, passages, temperature, group_size), rel=1e-5)


@pytest.mark.parametrize("group_size", [1, 2, 4])
def test_gradient_equals_closed_form(group_size: int) -> None:
    """d loss / d s = (softmax - one hot) / Q, so the gradient of a query is that, times the passages, / temperature."""
    queries, passages = unit_vectors(6, 8, seed=1), unit_vectors(6 * group_size, 8, seed=2)
    queries.requires_grad_()
    loss_of(queries, passages, 0.1, group_size).backward()
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
    at_positive = loss_of(passages[0::3], passages, 0.02, group_size=3)
    at_negative = loss_of(passages[1::3], passages, 0.02, group_size=3)
    assert at_positive < 1e-3 and at_negative > 5.0
    assert contrastive_accuracy(passages[0::3], passages, group_size=3) == 1.0
    assert contrastive_accuracy(passages[1::3], passages, group_size=3) == 0.0


def test_passages_of_other_queries_are_negatives() -> None:
    """Without them the loss would be that of a choice among G."""
    queries, passages = torch.zeros(7, 4), torch.zeros(14, 4)
    assert loss_of(queries, passages, 0.02, group_size=2).item() == pytest.approx(math.log(14))


def test_bf16_embeddings_are_compared_in_fp32() -> None:
    queries, passages = unit_vectors(32, 64, seed=4).bfloat16(), unit_vectors(32, 64, seed=5).bfloat16()
    expected = loop_loss(queries.double(), passages.double(), 0.02, 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(queries, passages, 0.02, group_size=1)
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
        loss_of(torch.zeros(num_queries, 4), torch.zeros(num_passages, 4), 0.02, group_size)


def brute_force(queries: Tensor, passages: Tensor, group_size: int, ids: list[int] | None, knobs: dict) -> Tensor:
    """Every option by its definition, one anchor and one candidate at a time, differentiable, in fp64."""

    def direction(anchors: Tensor, candidates: Tensor, targets: list[int], anchor_ids: Any, ids: Any) -> Tensor:
        losses = []
        for i, anchor in enumerate(anchors):
            positive = anchor @ candidates[targets[i]]
            kept = [positive]
            others = [(j, candidates[j], None if ids is None else ids[j]) for j in range(len(candidates))]
            others = [item for item in others if item[0] != targets[i]]
            if knobs.get("negatives") == "hard":
                others = [item for item in others if item[0] // group_size == i]
            if knobs.get("same_side_negatives"):
                others += [(-1, anchors[j], anchor_ids and anchor_ids[j]) for j in range(len(anchors)) if j != i]
            for _, candidate, text in others:
                similarity = anchor @ candidate
                margin = knobs.get("false_negative_margin")
                if margin is not None and similarity > positive + margin:
                    continue
                if ids is not None and text in (ids[targets[i]], anchor_ids[i]):
                    continue
                kept.append(similarity)
            logits = torch.stack(kept) / 0.1
            losses.append(logits.logsumexp(0) - logits[0])
        return torch.stack(losses).mean()

    num_queries = len(queries)
    starts = [group_size * i for i in range(num_queries)]
    query_ids, passage_ids = (None, None) if ids is None else (ids[:num_queries], ids[num_queries:])
    losses = [direction(queries, passages, starts, query_ids, passage_ids)]
    if knobs.get("symmetric"):
        positive_ids = passage_ids and [passage_ids[i] for i in starts]
        losses.append(direction(passages[::group_size], queries, list(range(num_queries)), positive_ids, query_ids))
    return torch.stack(losses).mean()


VARIANTS: list[dict] = [
    {},
    {"symmetric": True},
    {"negatives": "hard"},
    {"same_side_negatives": True},
    {"false_negative_margin": 0.1},
    {"negatives": "hard", "false_negative_margin": -0.2},
    {"symmetric": True, "same_side_negatives": True, "false_negative_margin": 0.05},
]


@pytest.mark.parametrize("chunk_elements", [1, 50, 1 << 24])
@pytest.mark.parametrize("with_ids", [False, True])
@pytest.mark.parametrize("knobs", VARIANTS, ids=str)
def test_variants_and_their_gradients(
    monkeypatch: pytest.MonkeyPatch, knobs: dict, with_ids: bool, chunk_elements: int
) -> None:
    """Against the definition, however few anchors are in memory at a time."""
    monkeypatch.setattr(contrastive, "CHUNK_ELEMENTS", chunk_elements)
    queries, passages = unit_vectors(7, 6, seed=11), unit_vectors(21, 6, seed=12)
    # Texts 3 and 5 come as the passage of several queries, and text 0 as a query and a passage.
    ids = [0, 1, 2, 3, 2, 4, 5] + [3, 0, 3, 5, 5, 9, *range(10, 20), 3, 5, 0, 0, 1] if with_ids else None
    results = []
    for compute in (
        lambda q, p: loss_of(q, p, 0.1, 3, None if ids is None else torch.tensor(ids), **knobs),
        lambda q, p: brute_force(q, p, 3, ids, knobs),
    ):
        leaves = queries.clone().requires_grad_(), passages.clone().requires_grad_()
        loss = compute(*leaves)
        (3 * loss).backward()
        results.append((loss.detach(), *(leaf.grad for leaf in leaves)))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


def test_variants_differ() -> None:
    """Each option changes this loss, so that the comparison above is of what it says."""
    queries, passages = unit_vectors(7, 6, seed=11), unit_vectors(21, 6, seed=12)
    losses = [loss_of(queries, passages, 0.1, 3, **knobs).item() for knobs in VARIANTS]
    assert len({round(loss, 6) for loss in losses}) == len(VARIANTS)


def test_matryoshka_is_the_mean_over_sizes() -> None:
    queries, passages = unit_vectors(5, 8, seed=1), unit_vectors(10, 8, seed=2)
    sizes = [8, 4, 2]
    each = [
        loss_of(*(torch.nn.functional.normalize(t[:, :size], dim=-1) for t in (queries, passages)), 0.1, 2)
        for size in sizes
    ]
    expected = torch.stack(each).mean()
    assert loss_of(queries, passages, 0.1, 2, matryoshka_dims=(4, 2, 8)).item() == pytest.approx(expected.item())
    with pytest.raises(ValueError, match="8 channels"):
        loss_of(queries, passages, 0.1, 2, matryoshka_dims=(16,))
