"""The variable-length backend where a context parallel rank has other queries than keys, against SDPA in fp32."""

from __future__ import annotations

import pytest
import torch

from megatron_grit.models.attention import AttentionMode, PackedAttention, PackedSegments, attend
from megatron_grit.models.row_share import RowShare, held_positions

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

LENGTHS = [37, 200, 1, 130, 16]


@pytest.mark.parametrize("window", [None, 64])
@pytest.mark.parametrize("mode", AttentionMode)
@pytest.mark.parametrize("rank", [0, 1])
def test_pieces_equal_the_whole_row(rank: int, mode: AttentionMode, window: int | None) -> None:
    """Alignment of queries and keys at their ends is what the backend must keep to."""
    from megatron_grit.config.schema import ParallelConfig
    from megatron_grit.models.layer_specs import transformer_config
    from megatron_grit.parallel.launch import parallel_job
    from tests.rows import tiny_config

    with parallel_job(ParallelConfig(device="cuda"), seed=1) as context:
        total, size = sum(LENGTHS), 2
        generator = torch.Generator(device="cuda").manual_seed(0)
        query, key, value = (
            torch.randn(total, 1, heads, 64, device=context.device, generator=generator).bfloat16()
            for heads in (8, 2, 2)
        )
        causal = mode is AttentionMode.CAUSAL
        parts = zip(*(tensor.squeeze(1).float().split(LENGTHS) for tensor in (query, key, value)), strict=True)
        whole = torch.cat([attend(*part, causal=causal, window=window if causal else None) for part in parts])
        share = RowShare(held_positions(total, rank, size).cuda(), total, rank, size, context.context_group)
        ends = torch.tensor([0, *LENGTHS], device=context.device).cumsum(0).to(torch.int32)
        segments = PackedSegments.of_row(ends, max(LENGTHS), mode, share)
        # The group has one rank here, so what it gathers is what it is given: all keys, rank by rank.
        order = torch.cat([held_positions(total, other, size) for other in range(size)]).cuda()
        config = transformer_config(tiny_config(hidden_size=512, num_attention_heads=8, num_query_groups=2))
        attention = PackedAttention(config, 1, backend="varlen", sliding_window=window).to(context.device)
        ours = attention(query[share.index_L], key[order], value[order], packed_seq_params=segments)
        torch.testing.assert_close(ours.float().view(-1, 8, 64), whole[share.index_L], rtol=2e-2, atol=2e-2)
