"""Attention over packed rows, with the mode of each forward pass carried by its micro-batch.

A row is several segments one after another. The mode, causal or bidirectional, travels with the row's segment
boundaries in :class:`PackedSegments` through every layer of every pipeline stage; it is never a default and never
``None``. One core-attention module serves all backends.

Shape suffix legend: T = tokens of a row, N = query heads, G = key-value heads, H = channels of a head.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_grit import compat
from megatron_grit.errors import ConfigError
from megatron_grit.models.row_share import RowShare


class AttentionMode(StrEnum):
    """What a token may see of its own segment. It never sees another segment."""

    CAUSAL = "causal"
    BIDIRECTIONAL = "bidirectional"


class KeyValueCache(Protocol):
    """Keys and values of earlier tokens of each segment, for generation."""

    def extend(self, layer_number: int, segment: int, key_LGH: Tensor, value_LGH: Tensor) -> tuple[Tensor, Tensor]:
        """Append a layer's new keys and values of a segment; return all of them."""
        ...


@dataclass
class PackedSegments(PackedSeqParams):
    """Segment boundaries of a row and its attention mode.

    ``qkv_format`` is not "thd": the engine then leaves rotary embedding to the positions that the row carries, and
    tensors in the layout [T, 1, heads, channels].
    """

    mode: AttentionMode | None = None
    cache: KeyValueCache | None = None
    key_index_K: Tensor | None = None
    """Under context parallelism: which of the gathered keys the queries see, piece by piece (see RowShare)."""
    key_group: dist.ProcessGroup | None = None
    """The ranks to gather keys and values over."""

    @functools.cached_property
    def lengths(self) -> list[int]:
        """Length of each segment, padding included. Only SDPA reads it: on a GPU that waits for the row."""
        return self.cu_seqlens_q.diff().tolist()

    @functools.cached_property
    def key_lengths(self) -> list[int]:
        """Keys of each segment."""
        return self.lengths if self.key_index_K is None else self.cu_seqlens_kv.diff().tolist()

    @staticmethod
    def of_row(
        cu_seqlens: Tensor, max_seqlen: int, mode: AttentionMode, share: RowShare | None = None
    ) -> PackedSegments:
        """Segments of a training row.

        Args:
            cu_seqlens: int32 [S + 1], from 0 to T.
            max_seqlen: longest segment.
            mode: attention mode of the whole row.
            share: the part of the row that this rank holds. None: all of it.
        """
        if share is not None:
            pieces = share.pieces(cu_seqlens, mode is AttentionMode.CAUSAL)
            return PackedSegments(
                qkv_format="sbhd",
                cu_seqlens_q=pieces.cu_queries,
                cu_seqlens_kv=pieces.cu_keys,
                max_seqlen_q=max(pieces.query_lengths),
                max_seqlen_kv=max(pieces.key_lengths),
                mode=mode,
                key_index_K=pieces.key_index_K,
                key_group=share.group,
            )
        return PackedSegments(
            qkv_format="sbhd",
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            max_seqlen_q=max_seqlen,
            max_seqlen_kv=max_seqlen,
            mode=mode,
        )


class PackedAttention(MegatronModule):
    """Core attention for the engine's SelfAttention: softmax(q k^T / sqrt(H)) v within each segment."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any = None,
        attention_type: str = "self",
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
        *,
        backend: str = "sdpa",
        sliding_window: int | None = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        self.layer_number = layer_number
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.softmax_scale = softmax_scale
        self.sliding_window = sliding_window
        self.backend = backend
        if backend == "te":
            # Under context parallelism the engine's wrapper would exchange keys itself, and cut rows otherwise.
            assert config.context_parallel_size == 1, "select_backend refuses this"
            te_attention = compat.te_core_attention_class()
            self.te_attention = te_attention(
                config, layer_number, attn_mask_type, attention_type, attention_dropout, softmax_scale
            )

    def forward(
        self,
        query_T1NH: Tensor,
        key_T1GH: Tensor,
        value_T1GH: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSegments | None = None,
        **_: Any,
    ) -> Tensor:
        """Attend within each segment.

        Returns:
            [T, 1, N * H].
        """
        segments = packed_seq_params
        assert isinstance(segments, PackedSegments) and segments.mode is not None, "a row carries no attention mode"
        assert attention_mask is None and attention_bias is None, "masks come from segments, not from tensors"
        query, key, value = query_T1NH.squeeze(1), key_T1GH.squeeze(1), value_T1GH.squeeze(1)
        if segments.key_index_K is not None:
            key, value = gather_keys(key, value, segments)
        causal = segments.mode is AttentionMode.CAUSAL
        # A window in the bidirectional pass would cut off what the pass is there to see.
        window = self.sliding_window if causal else None
        if segments.cache is not None or self.backend == "sdpa":
            context_TNH = self._sdpa(query, key, value, segments, causal, window)
        elif self.backend == "varlen":
            context_TNH = self._varlen(query, key, value, segments, causal, window)
        else:
            context_TNH = self._transformer_engine(query, key, value, segments, causal, window)
        return context_TNH.reshape(context_TNH.shape[0], 1, -1)

    def _sdpa(
        self, query: Tensor, key: Tensor, value: Tensor, segments: PackedSegments, causal: bool, window: int | None
    ) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        outputs = []
        split_keys = (tensor.split(segments.key_lengths) for tensor in (key, value))
        parts = zip(query.split(segments.lengths), *split_keys, strict=True)
        for segment, (query_LNH, key_LGH, value_LGH) in enumerate(parts):
            if segments.cache is not None:
                key_LGH, value_LGH = segments.cache.extend(self.layer_number, segment, key_LGH, value_LGH)
            outputs.append(attend(query_LNH, key_LGH, value_LGH, causal, window, dropout, self.softmax_scale))
        return torch.cat(outputs)

    def _varlen(
        self, query: Tensor, key: Tensor, value: Tensor, segments: PackedSegments, causal: bool, window: int | None
    ) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        if self.dropout and self.training:
            raise ConfigError("the varlen attention backend has no dropout; set model.attention_dropout to 0")
        left = -1 if window is None else window - 1
        context = varlen_attn(
            query,
            key,
            value,
            segments.cu_seqlens_q,
            segments.cu_seqlens_kv,
            segments.max_seqlen_q,
            segments.max_seqlen_kv,
            scale=self.softmax_scale,
            window_size=(left, 0) if causal else (-1, -1),
            enable_gqa=query.shape[1] != key.shape[1],
        )
        assert isinstance(context, Tensor)
        return context

    def _transformer_engine(
        self, query: Tensor, key: Tensor, value: Tensor, segments: PackedSegments, causal: bool, window: int | None
    ) -> Tensor:
        from megatron.core.transformer.enums import AttnMaskType

        # The engine's wrapper fixes a window when it is built, so it is built without one, and rows that reach
        # beyond a window take the exact path.
        if window is not None and segments.max_seqlen_q > window:
            return self._sdpa(query, key, value, segments, causal, window)
        packed = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=segments.cu_seqlens_q,
            cu_seqlens_kv=segments.cu_seqlens_kv,
            max_seqlen_q=segments.max_seqlen_q,
            max_seqlen_kv=segments.max_seqlen_kv,
        )
        mask_type = AttnMaskType.padding_causal if causal else AttnMaskType.padding
        output = self.te_attention(query, key, value, None, mask_type, packed_seq_params=packed)
        return output.reshape(query.shape)


def gather_keys(key_LGH: Tensor, value_LGH: Tensor, segments: PackedSegments) -> tuple[Tensor, Tensor]:
    """All ranks' keys and values, picked piece by piece; the backward pass sums each key's gradient over ranks.

    Returns:
        Keys and values, [K, G, H] each.
    """
    assert segments.key_index_K is not None
    both = torch.cat([key_LGH, value_LGH], dim=1)  # one exchange, not two
    gathered = gather_from_sequence_parallel_region(both, group=segments.key_group)[segments.key_index_K]
    num_groups = key_LGH.shape[1]
    return gathered[:, :num_groups], gathered[:, num_groups:]


def attend(
    query_LNH: Tensor,
    key_KGH: Tensor,
    value_KGH: Tensor,
    causal: bool,
    window: int | None = None,
    dropout: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """Attention of one segment.

    Args:
        query_LNH: the last L of the segment's K positions.
        key_KGH: keys of all K positions.
        value_KGH: values of all K positions.
        causal: a position sees itself and what precedes it; otherwise all.
        window: with ``causal``, a position sees this many positions, its own included.
        dropout: probability of dropping an attention weight.
        scale: multiplies the scores. None: H ** -0.5.

    Returns:
        [L, N, H].
    """
    num_queries, num_keys = query_LNH.shape[0], key_KGH.shape[0]
    query, key, value = (tensor.transpose(0, 1).unsqueeze(0) for tensor in (query_LNH, key_KGH, value_KGH))
    mask, is_causal = None, causal and num_queries > 1
    if not causal or window is None or num_keys <= window:
        window = None
    if window is not None or (is_causal and num_queries != num_keys):
        last = torch.arange(num_keys - num_queries, num_keys, device=query.device)[:, None]
        seen = torch.arange(num_keys, device=query.device)[None, :]
        mask, is_causal = seen <= last, False
        if window is not None:
            mask &= seen > last - window
    output = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output.squeeze(0).transpose(0, 1)


def select_backend(wanted: str, device: torch.device, context_size: int = 1) -> str:
    """The backend of ``model.attention_backend`` on a device.

    Args:
        wanted: as configured.
        device: where the model computes.
        context_size: context parallel size. Above 1 TransformerEngine is left out: it would exchange keys by itself and
            expects rows that are cut segment by segment.

    Raises:
        ConfigError: the wanted backend is not there.
    """
    if wanted == "auto":
        if device.type != "cuda":
            return "sdpa"
        if compat.have_transformer_engine() and context_size == 1:
            return "te"
        return "varlen" if compat.have_varlen_attention() else "sdpa"
    if wanted != "sdpa" and device.type != "cuda":
        raise ConfigError(f"model.attention_backend {wanted} needs a GPU; use auto or sdpa")
    if wanted == "te" and context_size > 1:
        raise ConfigError("model.attention_backend te does not go with parallel.context above 1; use auto or varlen")
    if wanted == "te" and not compat.have_transformer_engine():
        raise ConfigError("model.attention_backend is te, but TransformerEngine does not import; use auto or varlen")
    if wanted == "varlen" and not compat.have_varlen_attention():
        raise ConfigError("model.attention_backend is varlen, but this torch has none; use auto or sdpa")
    return wanted
