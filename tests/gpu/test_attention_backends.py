"""The fused attention backends in bf16 against SDPA in fp32: outputs and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_grit import compat
from megatron_grit.models.attention import AttentionMode, PackedAttention, PackedSegments, attend
from megatron_grit.models.layer_specs import transformer_config
from megatron_grit.models.row_share import RowShare, held_positions
from megatron_grit.parallel.context import ParallelContext
from tests.rows import tiny_config

LENGTHS = [37, 200, 1, 130, 16]
HEADS, CHANNELS = 8, 64


def inputs(device: torch.device, groups: int) -> list[Tensor]:
    """Queries, keys and values as the engine hands them over: bf16 views of one projection, [T, 1, heads, H]."""
    generator = torch.Generator(device).manual_seed(0)
    mixed = torch.randn(sum(LENGTHS), 1, HEADS + 2 * groups, CHANNELS, device=device, generator=generator)
    return list(mixed.bfloat16().requires_grad_().split([HEADS, groups, groups], dim=2))


def attention_of(backend: str, groups: int, window: int | None) -> PackedAttention:
    config = tiny_config(hidden_size=HEADS * CHANNELS, num_attention_heads=HEADS, num_query_groups=groups)
    config.training.precision = "bf16"
    return PackedAttention(transformer_config(config), 1, backend=backend, sliding_window=window)


def in_fp32(tensors: list[Tensor], mode: AttentionMode, window: int | None) -> Tensor:
    """Segment by segment, [T, N, H]."""
    causal = mode is AttentionMode.CAUSAL
    parts = zip(*(tensor.squeeze(1).float().split(LENGTHS) for tensor in tensors), strict=True)
    return torch.cat([attend(*part, causal=causal, window=window if causal else None) for part in parts])


def relative_error(ours: Tensor, expected: Tensor) -> float:
    return float((ours.float() - expected.float()).norm() / expected.float().norm())


@pytest.mark.parametrize("groups", [8, 2, 1])
@pytest.mark.parametrize("window", [None, 64])
@pytest.mark.parametrize("mode", AttentionMode)
@pytest.mark.parametrize("backend", ["varlen", "te", "sdpa"])
@pytest.mark.usefixtures("kernels")
def test_backend_equals_sdpa_in_fp32(
    context: ParallelContext, backend: str, mode: AttentionMode, window: int | None, groups: int
) -> None:
    if backend == "te" and not compat.have_transformer_engine():
        pytest.skip("TransformerEngine is not installed")
    if backend == "varlen" and not compat.have_varlen_attention():
        pytest.skip("this torch or this GPU has no variable-length attention")
    tensors = inputs(context.device, groups)
    bounds = torch.tensor([0, *LENGTHS], device=context.device).cumsum(0).to(torch.int32)
    attention = attention_of(backend, groups, window).to(context.device)
    # A row knows its longest segment as a multiple of something, so this may be too large and never too small.
    ours = attention(*tensors, packed_seq_params=PackedSegments.of_row(bounds, 256, mode))
    theirs = in_fp32(tensors, mode, window)
    assert ours.shape == (sum(LENGTHS), 1, HEADS * CHANNELS) and ours.dtype is torch.bfloat16
    assert relative_error(ours.view_as(theirs), theirs) < 1e-2
    generator = torch.Generator(context.device).manual_seed(1)
    upstream = torch.randn(theirs.shape, device=context.device, generator=generator)
    gradients = torch.autograd.grad(ours, tensors, upstream.bfloat16().view_as(ours))
    for mine, expected in zip(gradients, torch.autograd.grad(theirs, tensors, upstream), strict=True):
        assert relative_error(mine, expected) < 2e-2
    # A control: the other mode is not within the tolerance.
    other = next(each for each in AttentionMode if each is not mode)
    assert relative_error(ours.view_as(theirs), in_fp32(tensors, other, window)) > 0.1


@pytest.mark.parametrize("window", [None, 64])
@pytest.mark.parametrize("mode", AttentionMode)
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.usefixtures("kernels")
def test_pieces_of_context_parallel_ranks(
    context: ParallelContext, rank: int, mode: AttentionMode, window: int | None
) -> None:
    """Alignment of queries and keys at their ends is what the backend must keep to."""
    if not compat.have_varlen_attention():
        pytest.skip("this torch or this GPU has no variable-length attention")
    total, size, device = sum(LENGTHS), 2, context.device
    query, key, value = tensors = inputs(device, 2)
    whole = in_fp32(tensors, mode, window)
    share = RowShare(held_positions(total, rank, size).to(device), total, rank, size, context.context_group)
    ends = torch.tensor([0, *LENGTHS], device=device).cumsum(0).to(torch.int32)
    segments = PackedSegments.of_row(ends, max(LENGTHS), mode, share)
    # The group has one rank here, so what it gathers is what it is given: all keys, rank by rank.
    order = torch.cat([held_positions(total, other, size) for other in range(size)]).to(device)
    attention = attention_of("varlen", 2, window).to(device)
    ours = attention(query[share.index_L], key[order], value[order], packed_seq_params=segments)
    expected = whole[share.index_L]
    assert relative_error(ours.view_as(expected), expected) < 1e-2
    upstream = torch.ones_like(expected)
    mine = torch.autograd.grad(ours, tensors, upstream.bfloat16().view_as(ours))
    theirs = torch.autograd.grad(expected, tensors, upstream)
    for gradient, wanted in zip(mine, theirs, strict=True):
        assert relative_error(gradient, wanted) < 2e-2
