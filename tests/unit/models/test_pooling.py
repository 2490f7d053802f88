"""Pooling against one loop a segment."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_grit.data.indexed.roles import RowKind
from megatron_grit.models.decoder import Output, build_model
from megatron_grit.models.pooling import METHODS, pool
from megatron_grit.parallel.context import ParallelContext
from tests.rows import VOCAB, make_row, tiny_config

STATES = torch.randn(20, 5, generator=torch.Generator().manual_seed(0))
SEGMENTS = torch.tensor([0] * 6 + [1] * 3 + [2] * 8 + [3] * 3)  # the last three are padding
MASK = torch.tensor([0, 0, 1, 1, 1, 1] + [1, 1, 1] + [0] * 7 + [1] + [0] * 3).float()
LEARNED = torch.rand(8, generator=torch.Generator().manual_seed(1)) + 0.5


def by_loop(method: str) -> Tensor:
    pooled = []
    for segment in range(3):
        inside = segment == SEGMENTS
        states, mask = STATES[inside], MASK[inside]
        text = states[mask > 0]
        ranks = torch.arange(1, len(text) + 1).float()[:, None]
        positions = torch.arange(1, len(states) + 1).float()[mask > 0, None]
        learned = LEARNED[: len(states)][mask > 0, None]
        pooled.append(
            {
                "mean": text.mean(0),
                "weightedmean": (text * ranks).sum(0) / ranks.sum(),
                "weightedmean_sgpt": (text * positions).sum(0) / positions.sum(),
                "learnedmean": (text * learned).sum(0) / learned.sum(),
                "max": text.max(0).values,
                "cls": states[0],
                "lasttoken": text[-1],
            }[method]
        )
    return torch.stack(pooled)


@pytest.mark.parametrize("method", METHODS)
def test_methods(method: str) -> None:
    pooled = pool(STATES, MASK, SEGMENTS, 3, method, position_weights=LEARNED)
    torch.testing.assert_close(pooled, by_loop(method))


@pytest.mark.parametrize("method", METHODS)
def test_gradients_reach_the_pooled_states_only(method: str) -> None:
    states = STATES.clone().requires_grad_()
    pool(states, MASK, SEGMENTS, 3, method, position_weights=LEARNED).sum().backward()
    touched = states.grad.abs().sum(1) > 0  # type: ignore[union-attr]
    assert not touched[SEGMENTS == 3].any()
    if method != "cls":
        assert not touched[MASK == 0].any()


@pytest.mark.parametrize("method", ["mean", "weightedmean_sgpt", "learnedmean", "max", "lasttoken"])
def test_gradients_are_those_of_the_definition(method: str) -> None:
    gradients = []
    for position_in_row in (True, False):
        states, learned = STATES.double().requires_grad_(), LEARNED.double().requires_grad_()
        if position_in_row:
            pooled = pool(states, MASK, SEGMENTS, 3, method, position_weights=learned).double()
        else:
            parts = []
            for segment in range(3):
                inside = (segment == SEGMENTS) & (MASK > 0)
                first = int((segment == SEGMENTS).nonzero()[0])
                places = inside.nonzero()[:, 0]
                text, weights = states[places], torch.ones(len(places), dtype=torch.float64)
                if method == "weightedmean_sgpt":
                    weights = (places - first + 1).double()
                if method == "learnedmean":
                    weights = learned[places - first]
                if method in ("max", "lasttoken"):
                    parts.append(text.max(0).values if method == "max" else text[-1])
                else:
                    parts.append((text * weights[:, None]).sum(0) / weights.sum())
            pooled = torch.stack(parts)
        (pooled * torch.arange(15.0).view(3, 5)).sum().backward()
        gradients.append((states.grad, learned.grad))
    for ours, expected in zip(*gradients, strict=True):
        if expected is not None:
            torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_equal_maxima_share_the_gradient() -> None:
    states = torch.tensor([[1.0], [3.0], [3.0]], requires_grad=True)
    pool(states, torch.ones(3), torch.zeros(3, dtype=torch.int64), 1, "max").sum().backward()
    assert states.grad is not None and states.grad[:, 0].tolist() == [0.0, 0.5, 0.5]


def test_an_instruction_counts_in_sgpt_numbering_only() -> None:
    mask, segments, states = torch.tensor([0.0, 1, 1]), torch.zeros(3, dtype=torch.int64), torch.eye(3)
    assert pool(states, mask, segments, 1, "weightedmean")[0].tolist() == pytest.approx([0, 1 / 3, 2 / 3])
    assert pool(states, mask, segments, 1, "weightedmean_sgpt")[0].tolist() == pytest.approx([0, 2 / 5, 3 / 5])


def test_padding_may_be_longer_than_the_learned_positions() -> None:
    segments = torch.tensor([0, 0] + [1] * 30)
    states = torch.randn(32, 4, generator=torch.Generator().manual_seed(2))
    mask = (segments == 0).float()
    pooled = pool(states, mask, segments, 1, "learnedmean", position_weights=torch.tensor([1.0, 3.0]))
    torch.testing.assert_close(pooled[0], 0.25 * states[0] + 0.75 * states[1])


def test_pooling_is_in_fp32() -> None:
    """256 states of 1.01 in bf16 sum to 258.6; a bf16 sum would stop at 256."""
    states = torch.full((256, 1), 1.01, dtype=torch.bfloat16)
    pooled = pool(states, torch.ones(256), torch.zeros(256, dtype=torch.int64), 1, "mean")
    assert pooled.dtype is torch.float32
    assert pooled.item() == pytest.approx(states[0].item(), rel=1e-6)


def test_projection_and_normalisation(context: ParallelContext) -> None:
    config = tiny_config()
    config.embedding.projection_dim = 12
    model = build_model(config, VOCAB, context).eval()
    row = make_row(RowKind.EMBEDDING, [5, 9], 16)
    embeddings = model(row, Output.EMBEDDINGS)
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(2))
    assert model.embedding_head is not None and row.pool_mask_T is not None and row.segment_ids_T is not None
    projected = model.embedding_head(model(row, Output.HIDDEN)[:, 0])
    pooled = torch.stack([projected[:5].mean(0), projected[5:14].mean(0)])
    torch.testing.assert_close(embeddings, pooled / pooled.norm(dim=1, keepdim=True))


def test_instruction_is_attended_and_not_pooled(context: ParallelContext) -> None:
    model = build_model(tiny_config(), VOCAB, context).eval()
    row = make_row(RowKind.EMBEDDING, [12], 12)
    assert row.pool_mask_T is not None
    row.pool_mask_T[:4] = 0
    before = model(row, Output.EMBEDDINGS)
    hidden = model(row, Output.HIDDEN)[4:12, 0].mean(0)
    torch.testing.assert_close(before[0], hidden / hidden.norm())
    row.tokens_1T[0, 1] = (row.tokens_1T[0, 1] + 1) % VOCAB
    assert (model(row, Output.EMBEDDINGS) - before).abs().max() > 1e-4


def test_logits_of_the_padded_vocabulary_are_cut_off(context: ParallelContext) -> None:
    model = build_model(tiny_config(vocab_multiple=64), VOCAB, context).eval()
    assert model.output_layer.weight.shape[0] == 128
    row = make_row(RowKind.GENERATIVE, [10], 10)
    logits = model(row, Output.LOGITS)
    assert logits.shape == (10, VOCAB)
    assert row.labels_1T is not None and row.loss_mask_1T is not None
    expected = torch.nn.functional.cross_entropy(logits, row.labels_1T[0], reduction="none") * row.loss_mask_1T[0]
    torch.testing.assert_close(model(row, Output.TOKEN_LOSSES), expected, rtol=1e-5, atol=1e-5)
