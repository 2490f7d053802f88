"""Pooling against one loop a segment."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_grit.data.roles import RowKind
from megatron_grit.models.gpt import Output, build_model
from megatron_grit.models.pooling import METHODS, pool
from megatron_grit.parallel.context import ParallelContext
from tests.rows import VOCAB, make_row, tiny_config

STATES = torch.randn(20, 5, generator=torch.Generator().manual_seed(0))
SEGMENTS = torch.tensor([0] * 6 + [1] * 3 + [2] * 8 + [3] * 3)  # the last three are padding
MASK = torch.tensor([0, 0, 1, 1, 1, 1] + [1, 1, 1] + [0] * 7 + [1] + [0] * 3).float()


def by_loop(method: str) -> Tensor:
    pooled = []
    for segment in range(3):
        inside = segment == SEGMENTS
        states, mask = STATES[inside], MASK[inside]
        text = states[mask > 0]
        weights = torch.arange(1, len(text) + 1).float()[:, None]
        pooled.append(
            {
                "mean": text.mean(0),
                "weightedmean": (text * weights).sum(0) / weights.sum(),
                "cls": states[0],
                "lasttoken": text[-1],
            }[method]
        )
    return torch.stack(pooled)


@pytest.mark.parametrize("method", METHODS)
def test_methods(method: str) -> None:
    torch.testing.assert_close(pool(STATES, MASK, SEGMENTS, 3, method), by_loop(method))


@pytest.mark.parametrize("method", METHODS)
def test_gradients_reach_the_pooled_states_only(method: str) -> None:
    states = STATES.clone().requires_grad_()
    pool(states, MASK, SEGMENTS, 3, method).sum().backward()
    touched = states.grad.abs().sum(1) > 0  # type: ignore[union-attr]
    assert not touched[SEGMENTS == 3].any()
    if method != "cls":
        assert not touched[MASK == 0].any()


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
