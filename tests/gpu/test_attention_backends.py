"""CUDA attention backends against SDPA in fp32."""

from __future__ import annotations

import pytest
import torch

from megatron_grit import compat
from megatron_grit.models.attention import AttentionMode, attend

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

LENGTHS = [37, 200, 1, 130, 16]


@pytest.mark.parametrize("window", [None, 64])
@pytest.mark.parametrize("mode", AttentionMode)
@pytest.mark.parametrize("backend", ["varlen", "te"])
def test_backend_equals_sdpa_in_fp32(backend: str, mode: AttentionMode, window: int | None) -> None:
    if backend == "te" and not compat.have_transformer_engine():
        pytest.skip("TransformerEngine is not installed")
    from megatron_grit.config.schema import ParallelConfig
    from megatron_grit.models.attention import PackedAttention, PackedSegments
    from megatron_grit.models.layer_specs import transformer_config
    from megatron_grit.parallel.launch import parallel_job
    from tests.rows import tiny_config

    with parallel_job(ParallelConfig(device="cuda"), seed=1) as context:
        generator = torch.Generator(device="cuda").manual_seed(0)
        total = sum(LENGTHS)
        query, key, value = (
            torch.randn(total, 1, heads, 64, device=context.device, generator=generator).bfloat16().requires_grad_()
            for heads in (8, 2, 2)
        )
        bounds = torch.tensor([0, *LENGTHS], device=context.device).cumsum(0).to(torch.int32)
        config = transformer_config(tiny_config(hidden_size=512, num_attention_heads=8, num_query_groups=2))
        attention = PackedAttention(config, 1, backend=backend, sliding_window=window).to(context.device)
        segments = PackedSegments.of_row(bounds, max(LENGTHS), mode)
        ours = attention(query, key, value, packed_seq_params=segments)
        causal = mode is AttentionMode.CAUSAL
        parts = zip(*(tensor.squeeze(1).float().split(LENGTHS) for tensor in (query, key, value)), strict=True)
        theirs = torch.cat([attend(*part, causal=causal, window=window if causal else None) for part in parts])
        torch.testing.assert_close(ours.float().view_as(theirs), theirs, rtol=2e-2, atol=2e-2)
        upstream = torch.randn(theirs.shape, device=context.device, generator=generator)
        ours_grads = torch.autograd.grad(ours.view_as(theirs), (query, key, value), upstream.bfloat16())
        theirs_grads = torch.autograd.grad(theirs, (query, key, value), upstream)
        for mine, expected in zip(ours_grads, theirs_grads, strict=True):
            torch.testing.assert_close(mine.float(), expected.float(), rtol=5e-2, atol=5e-2)
