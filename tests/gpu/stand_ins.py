"""What the documentation says of the fused attention kernels, in plain torch, to run their callers on the CPU.

torch.nn.attention.varlen: https://docs.pytorch.org/docs/2.12/nn.attention.varlen.html. TransformerEngine's
DotProductAttention as megatron-core wraps it (extensions/transformer_engine.py). Both refuse what CUDA would refuse:
other dtypes, offsets that are not int32, lengths that are too small.

Shape suffix legend: T = tokens, N = query heads, G = key-value heads, H = channels of a head.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put both in place."""
    import torch.nn.attention.varlen as varlen

    from megatron_grit import compat

    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    monkeypatch.setattr(compat, "te_core_attention_class", lambda: TEDotProductAttention)
    monkeypatch.setattr(compat, "have_varlen_attention", lambda: True)
    monkeypatch.setattr(compat, "have_transformer_engine", lambda: True)


def varlen_attn(
    query_TNH: Tensor,
    key_TGH: Tensor,
    value_TGH: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> Tensor:
    """Queries and keys of a segment are aligned at their ends; (left, right) is what a query sees around its place."""
    for tensor in (query_TNH, key_TGH, value_TGH):
        assert tensor.dtype in (torch.bfloat16, torch.float16) and tensor.stride(-1) == 1
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert enable_gqa or query_TNH.shape[1] == key_TGH.shape[1]
    lengths_q, lengths_k = cu_seq_q.diff().tolist(), cu_seq_k.diff().tolist()
    assert max(lengths_q) <= max_q and max(lengths_k) <= max_k
    assert sum(lengths_q) == len(query_TNH) and sum(lengths_k) == len(key_TGH) == len(value_TGH)
    left, right = window_size
    outputs = []
    parts = zip(query_TNH.split(lengths_q), key_TGH.split(lengths_k), value_TGH.split(lengths_k), strict=True)
    for query, key, value in parts:
        repeat = query.shape[1] // key.shape[1]
        key, value = (tensor.float().repeat_interleave(repeat, 1) for tensor in (key, value))
        scores = torch.einsum("qnh,knh->nqk", query.float(), key) * (scale or query.shape[-1] ** -0.5)
        place = torch.arange(len(query)) + len(key) - len(query)
        ahead = torch.arange(len(key))[None, :] - place[:, None]
        hidden = ((ahead < -left) & (left >= 0)) | ((ahead > right) & (right >= 0))
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        outputs.append(torch.einsum("nqk,knh->qnh", weights, value).to(query.dtype))
    return torch.cat(outputs)


class TEDotProductAttention(torch.nn.Module):
    """The arguments that the engine's wrapper has in both versions; packed rows only."""

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
    ) -> None:
        super().__init__()
        self.scale = softmax_scale
        assert attn_mask_type.name == "padding_causal" and attention_type == "self" and layer_number > 0

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
        num_splits: int | None = None,
    ) -> Tensor:
        """[T, N * H]."""
        packed, causal = packed_seq_params, {"padding_causal": True, "padding": False}[attn_mask_type.name]
        assert packed.qkv_format == "thd" and attention_mask is None
        output = varlen_attn(
            query,
            key,
            value,
            packed.cu_seqlens_q,
            packed.cu_seqlens_kv,
            packed.max_seqlen_q,
            packed.max_seqlen_kv,
            scale=self.scale,
            window_size=(-1, 0) if causal else (-1, -1),
            enable_gqa=True,
        )
        return output.flatten(1)
