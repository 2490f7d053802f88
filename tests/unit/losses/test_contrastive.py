"""The contrastive loss against a loop over queries and passages."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_grit.losses import contrastive
from megatron_grit.losses.contrastive import (
    ContrastiveOptions,
    contrastive_accuracy,
    contrastive_loss,
    contrastive_loss_and_accuracy,
)


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
    alike = torch.ones(3, 2), torch.ones(6, 2)
    assert contrastive_accuracy(*alike, group_size=2) == 0.0
    assert contrastive_loss_and_accuracy(*alike, ContrastiveOptions(temperature=1.0, group_size=2))[1] == 0.0


@pytest.mark.parametrize(("num_queries", "num_passages", "group_size"), [(3, 5, 2), (3, 3, 0), (0, 0, 1)])
def test_shapes_that_do_not_fit(num_queries: int, num_passages: int, group_size: int) -> None:
    with pytest.raises(ValueError, match="passages"):
        loss_of(torch.zeros(num_queries, 4), torch.zeros(num_passages, 4), 0.02, group_size)


def test_blocks_of_equal_size_only() -> None:
    with pytest.raises(ValueError, match="6 queries cannot be cut into 4 blocks"):
        loss_of(torch.zeros(6, 4), torch.zeros(6, 4), 0.02, 1, num_blocks=4)


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

    num_queries, num_blocks = len(queries), knobs.get("num_blocks", 1)
    if num_blocks > 1:
        inner = {**knobs, "num_blocks": 1}
        block_losses = []
        places = (range_blocks(count, num_blocks) for count in (num_queries, len(passages)))
        for own_q, own_p in zip(*places, strict=True):
            own_ids = None if ids is None else ids[:num_queries][own_q] + ids[num_queries:][own_p]
            block_losses.append(brute_force(queries[own_q], passages[own_p], group_size, own_ids, inner))
        return torch.stack(block_losses).mean()
    if knobs.get("gradient_sides") == "queries":
        passages = passages.detach()
    if knobs.get("gradient_sides") == "passages":
        queries = queries.detach()
    starts = [group_size * i for i in range(num_queries)]
    query_ids, passage_ids = (None, None) if ids is None else (ids[:num_queries], ids[num_queries:])
    losses = [direction(queries, passages, starts, query_ids, passage_ids)]
    if knobs.get("symmetric"):
        positive_ids = passage_ids and [passage_ids[i] for i in starts]
        losses.append(direction(passages[::group_size], queries, list(range(num_queries)), positive_ids, query_ids))
    return torch.stack(losses).mean()


def range_blocks(count: int, num_blocks: int) -> list[slice]:
    """Equal pieces of a list."""
    size = count // num_blocks
    return [slice(start, start + size) for start in range(0, count, size)]


VARIANTS: list[dict] = [
    {},
    {"symmetric": True},
    {"negatives": "hard"},
    {"same_side_negatives": True},
    {"false_negative_margin": 0.1},
    {"negatives": "hard", "false_negative_margin": -0.2},
    {"symmetric": True, "same_side_negatives": True, "false_negative_margin": 0.05},
    {"num_blocks": 2},
    {"num_blocks": 3, "symmetric": True, "same_side_negatives": True},
]
SIDES = [{"gradient_sides": side, "symmetric": symmetric} for side in ("queries", "passages") for symmetric in (0, 1)]


@pytest.mark.parametrize("chunk_elements", [1, 50, 1 << 24])
@pytest.mark.parametrize("with_ids", [False, True])
@pytest.mark.parametrize("knobs", VARIANTS + SIDES, ids=str)
def test_variants_and_their_gradients(
    monkeypatch: pytest.MonkeyPatch, knobs: dict, with_ids: bool, chunk_elements: int
) -> None:
    """Against the definition, however few anchors are in memory at a time."""
    monkeypatch.setattr(contrastive, "CHUNK_ELEMENTS", chunk_elements)
    queries, passages = sample_texts()
    ids = SAMPLE_IDS if with_ids else None
    ours = loss_and_gradients(
        lambda q, p: loss_of(q, p, 0.1, 3, None if ids is None else torch.tensor(ids), **knobs), queries, passages
    )
    expected = loss_and_gradients(lambda q, p: brute_force(q, p, 3, ids, knobs), queries, passages)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)
    if "gradient_sides" in knobs:
        moved = [bool(gradient.abs().max() > 0) for gradient in ours[1:]]
        assert moved == [knobs["gradient_sides"] == "queries", knobs["gradient_sides"] == "passages"]


# Texts 3 and 5 come as the passage of several queries, and text 0 as a query and a passage.
SAMPLE_IDS = [0, 1, 2, 3, 2, 4] + [3, 0, 3, 5, 5, 9, *range(10, 17), 3, 5, 0, 0, 1]


def sample_texts() -> tuple[Tensor, Tensor]:
    return unit_vectors(6, 6, seed=11), unit_vectors(18, 6, seed=12)


def loss_and_gradients(compute: Callable[[Tensor, Tensor], Tensor], *texts: Tensor) -> list[Tensor]:
    """Of three times the loss, so that an incoming gradient that is not used is seen."""
    leaves = [side.clone().requires_grad_() for side in texts]
    loss = compute(*leaves)
    (3 * loss).backward()
    return [loss.detach(), *(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("with_ids", [False, True])
@pytest.mark.parametrize("knobs", [*VARIANTS, {"matryoshka_dims": (2, 4)}], ids=str)
def test_shares_of_the_anchors_add_up(knobs: dict, with_ids: bool) -> None:
    """Loss, gradients and accuracy, with more shares than one query each would need too."""
    queries, passages = sample_texts()
    ids = torch.tensor(SAMPLE_IDS) if with_ids else None
    options = ContrastiveOptions(temperature=0.1, group_size=3, **knobs)
    whole = loss_and_gradients(lambda q, p: contrastive_loss(q, p, options, ids), queries, passages)
    accuracy = contrastive_accuracy(queries, passages, 3)
    for count in (2, 5, 8):
        shares = [slice(6 * rank // count, 6 * (rank + 1) // count) for rank in range(count)]
        parts = [
            loss_and_gradients(lambda q, p, own=own: contrastive_loss(q, p, options, ids, own), queries, passages)
            for own in shares
        ]
        torch.testing.assert_close([sum(terms) for terms in zip(*parts, strict=True)], whole, rtol=1e-9, atol=1e-9)
        hits = [contrastive_loss_and_accuracy(queries, passages, options, ids, own)[1] for own in shares]
        assert sum(hits) == pytest.approx(accuracy.item())
    assert 0 < accuracy < 1


@pytest.mark.parametrize("knobs", VARIANTS, ids=str)
def test_sides_in_turn_are_both_sides(knobs: dict) -> None:
    """GritLM's split_emb: passages with constant queries, then queries with constant passages."""
    losses: dict[str, list[Tensor]] = {}
    for side in ("both", "queries", "passages"):
        options = ContrastiveOptions(temperature=0.1, group_size=3, gradient_sides=side, **knobs)  # type: ignore[arg-type]
        losses[side] = loss_and_gradients(lambda q, p, o=options: contrastive_loss(q, p, o), *sample_texts())
    assert losses["queries"][0] == losses["passages"][0] == losses["both"][0]
    torch.testing.assert_close([losses["queries"][1], losses["passages"][2]], losses["both"][1:], rtol=1e-12, atol=0)


@pytest.mark.parametrize(("ids", "count"), [(None, 1), (torch.zeros(12, dtype=torch.int64), 6)])
def test_an_anchor_without_negatives_has_no_loss(ids: Tensor | None, count: int) -> None:
    """One text in the whole batch, or all others left out."""
    texts = [side[:count] for side in sample_texts()]
    loss, *gradients = loss_and_gradients(lambda q, p: loss_of(q, p, 0.1, 1, ids), *texts)
    assert loss == 0 and all(gradient.abs().max() == 0 for gradient in gradients)


def test_small_losses_keep_their_precision() -> None:
    """Queries at their positives: a loss below the spacing of fp32 at 1, to four digits, and its gradient."""
    queries = torch.eye(6, 8, dtype=torch.float64)
    passages = queries + 0.01 * unit_vectors(6, 8, seed=3)
    expected = loss_and_gradients(lambda q, p: loss_of(q, p, 0.05, 1), queries, passages)
    ours = loss_and_gradients(lambda q, p: loss_of(q, p, 0.05, 1), queries.float(), passages.float())
    assert 1e-9 < expected[0] < 1e-7
    for single, double in zip(ours, expected, strict=True):
        assert (single - double).norm() < 1e-4 * double.norm()


def test_not_a_number_is_passed_on() -> None:
    queries, passages = sample_texts()
    queries[2, 3] = torch.nan
    options = ContrastiveOptions(temperature=0.1, group_size=3)
    loss, accuracy = contrastive_loss_and_accuracy(queries, passages, options)
    assert loss.isnan()
    assert accuracy == contrastive_accuracy(queries, passages, 3) <= 5 / 6


class PeakMemory(TorchDispatchMode):
    """The largest tensor that an operation returned, in bytes."""

    largest = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        return result


def test_a_large_batch_in_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """8,192 queries: no tensor is larger than a chunk, and sampled anchors have the loss and gradient of the text."""
    monkeypatch.setattr(contrastive, "CHUNK_ELEMENTS", 1 << 21)
    count, sample = 8192, [0, 255, 256, 5000, 8191]
    queries, passages = unit_vectors(count, 8, seed=1).float(), unit_vectors(count, 8, seed=2).float()
    queries.requires_grad_()
    with PeakMemory() as memory:
        loss = loss_of(queries, passages, 0.1, 1)
        loss.backward()
    assert memory.largest == 4 << 21
    losses, gradients = [], []
    for query in sample:
        logits = queries[query].detach().double() @ passages.double().T / 0.1
        losses.append(logits.logsumexp(0) - logits[query])
        gradients.append((logits.softmax(0) @ passages.double() - passages[query]) / 0.1 / count)
    assert queries.grad is not None
    torch.testing.assert_close(queries.grad[sample], torch.stack(gradients).float(), rtol=1e-4, atol=1e-9)
    options = ContrastiveOptions(temperature=0.1, group_size=1)
    for query, expected in zip(sample, losses, strict=True):
        share = contrastive_loss(queries.detach(), passages, options, anchors=slice(query, query + 1))
        assert count * share.item() == pytest.approx(expected.item(), rel=1e-5)


def test_variants_differ() -> None:
    """Each option changes this loss, so that the comparison above is of what it says."""
    queries, passages = sample_texts()
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
