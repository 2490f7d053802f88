"""Attention over packed rows, with the mode of each forward pass carried by its micro-batch.

A row is several segments one after another. The mode, causal or bidirectional, travels with the row's segment
boundaries in :class:`PackedSegments` through every layer of every pipeline stage; it is never a default and never
``None``. One core-attention module serves all backends.

Shape suffix legend: T = tokens of a row, N = query heads, G = key-value heads, H = channels of a head.
"""

from __future__ import annotations

from dataclasses import dataclass, field
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

_MOST_CHANNELS = 256
"""Channels of a head in the kernels of FlashAttention-2, which torch and TransformerEngine call."""


class AttentionMode(StrEnum):
    """What a token may see of its own segment. It never sees another segment."""

    CAUSAL = "causal"
    BIDIRECTIONAL = "bidirectional"


class KeyValueCache(Protocol):
    """Keys and values of earlier tokens of each segment, for generation."""

    def extend(self, layer_number: int, segment: int, key_LGH: Tensor, value_LGH: Tensor) -> tuple[Tensor, Tensor]:
        """Append a layer's new keys and values of a segment; return all of them."""
        ...

    def places(self, segment: int) -> Tensor | None:
        """Where the segment's tokens stand among its keys: int64 [L]. None: they are the last ones."""
        ...


@dataclass
class PackedSegments(PackedSeqParams):
    """Segment boundaries of a row and its attention mode.

    ``qkv_format`` is not "thd", so the engine rotates by the angles it is given, one for each token, and keeps tensors
    in the layout [T, 1, heads, channels].
    """

    mode: AttentionMode | None = None
    cache: KeyValueCache | None = None
    lengths: list[int] = field(default_factory=list)
    """Queries of each segment, padding included. Used by SDPA."""
    key_lengths: list[int] | None = None
    """Keys of each segment. None: as many as queries."""
    key_index_K: Tensor | None = None
    """Under context parallelism: which of the gathered keys the queries see, piece by piece (see RowShare)."""
    key_group: dist.ProcessGroup | None = None
    """The ranks to gather keys and values over."""

    @staticmethod
    def of_row(
        cu_seqlens: Tensor,
        max_seqlen: int,
        mode: AttentionMode,
        share: RowShare | None = None,
        lengths: list[int] | None = None,
    ) -> PackedSegments:
        """Segments of a training row.

        Args:
            cu_seqlens: int32 [S + 1], from 0 to T.
            max_seqlen: longest segment.
            mode: attention mode of the whole row.
            share: the part of the row that this rank holds. None: all of it.
            lengths: of the segments. None: read from ``cu_seqlens``, which makes the host wait for a GPU.
        """
        if lengths is None:
            lengths = cu_seqlens.diff().tolist()
        if share is not None:
            pieces = share.pieces(lengths, mode is AttentionMode.CAUSAL)
            return PackedSegments(
                qkv_format="sbhd",
                cu_seqlens_q=pieces.cu_queries,
                cu_seqlens_kv=pieces.cu_keys,
                max_seqlen_q=max(pieces.query_lengths),
                max_seqlen_kv=max(pieces.key_lengths),
                mode=mode,
                lengths=pieces.query_lengths,
                key_lengths=pieces.key_lengths,
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
            lengths=lengths,
        )


class PackedAttention(MegatronModule):
    """Core attention for the engine's SelfAttention: softmax(q k^T / sqrt(H)) v within each segment."""

    def __init__(  # many: the engine passes them
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
            from megatron.core.transformer.enums import AttnMaskType

            # Under context parallelism the engine's wrapper would exchange keys itself, and cut rows otherwise.
            assert config.context_parallel_size == 1, "select_backend refuses this"
            te_attention = compat.te_core_attention_class()
            self.te_attention = te_attention(
                config, layer_number, AttnMaskType.padding_causal, attention_type, attention_dropout, softmax_scale
            )

    def forward(  # many: the engine passes them
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
        # A window would hide from the bidirectional pass what it has to see.
        window = self.sliding_window if causal else None
        # The engine's wrapper takes its window when it is built, so it is built without one, and rows longer than a
        # window use SDPA.
        beyond = window is not None and segments.max_seqlen_q > window
        if segments.cache is not None or self.backend == "sdpa" or (self.backend == "te" and beyond):
            context_TNH = self._sdpa(query, key, value, segments, causal, window)
        elif self.backend == "varlen":
            context_TNH = self._varlen(query, key, value, segments, causal, window)
        else:
            context_TNH = self._transformer_engine(query, key, value, segments, causal)
        return context_TNH.reshape(context_TNH.shape[0], 1, -1)

    def _sdpa(
        self, query: Tensor, key: Tensor, value: Tensor, segments: PackedSegments, causal: bool, window: int | None
    ) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        outputs = []
        key_lengths = segments.lengths if segments.key_lengths is None else segments.key_lengths
        split_keys = (tensor.split(key_lengths) for tensor in (key, value))
        parts = zip(query.split(segments.lengths), *split_keys, strict=True)
        for segment, (query_LNH, key_LGH, value_LGH) in enumerate(parts):
            places_L = None
            if segments.cache is not None:
                key_LGH, value_LGH = segments.cache.extend(self.layer_number, segment, key_LGH, value_LGH)
                places_L = segments.cache.places(segment)
            scale = self.softmax_scale
            outputs.append(attend(query_LNH, key_LGH, value_LGH, causal, window, dropout, scale, places_L))
        return torch.cat(outputs)

    def _varlen(
        self, query: Tensor, key: Tensor, value: Tensor, segments: PackedSegments, causal: bool, window: int | None
    ) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

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
        self, query: Tensor, key: Tensor, value: Tensor, segments: PackedSegments, causal: bool
    ) -> Tensor:
        from megatron.core.transformer.enums import AttnMaskType

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
    """Keys and values gathered over ranks and selected piece by piece; the backward pass sums their gradients.

    Returns:
        Keys and values, [K, G, H] each.
    """
    assert segments.key_index_K is not None
    both = torch.cat([key_LGH, value_LGH], dim=1)  # one exchange, not two
    gathered = gather_from_sequence_parallel_region(both, group=segments.key_group)[segments.key_index_K]
    num_groups = key_LGH.shape[1]
    return gathered[:, :num_groups], gathered[:, num_groups:]


def attend(  # many: what attention consists of
    query_LNH: Tensor,
    key_KGH: Tensor,
    value_KGH: Tensor,
    causal: bool,
    window: int | None = None,
    dropout: float = 0.0,
    scale: float | None = None,
    places_L: Tensor | None = None,
) -> Tensor:
    """Attention of one segment.

    Args:
        query_LNH: of L of the segment's K positions.
        key_KGH: keys of all K positions.
        value_KGH: values of all K positions.
        causal: a position sees itself and what precedes it; otherwise all.
        window: with ``causal``, a position sees this many positions, its own included.
        dropout: probability of dropping an attention weight.
        scale: multiplies the scores. None: H ** -0.5.
        places_L: int64, which positions the queries are of. None: the last L.

    Returns:
        [L, N, H].
    """
    num_queries, num_keys = query_LNH.shape[0], key_KGH.shape[0]
    query, key, value = (tensor.transpose(0, 1).unsqueeze(0) for tensor in (query_LNH, key_KGH, value_KGH))
    mask, is_causal = None, causal and num_queries > 1
    if not causal or window is None or num_keys <= window:
        window = None
    scattered = causal and places_L is not None
    if window is not None or scattered or (is_causal and num_queries != num_keys):
        last = torch.arange(num_keys - num_queries, num_keys, device=query.device)[:, None]
        if places_L is not None:
            last = places_L[:, None]
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


def select_backend(wanted: str, device: torch.device, config: TransformerConfig) -> str:
    """The backend of ``model.attention_backend``.

    Args:
        wanted: as configured. auto: the first of te, varlen and sdpa that can do what the run needs.
        device: where the model computes.
        config: the engine's configuration of the run.

    Raises:
        ConfigError: the wanted backend cannot.
    """
    if wanted == "auto":
        return next((name for name in ("te", "varlen") if _obstacle(name, device, config) is None), "sdpa")
    obstacle = None if wanted == "sdpa" else _obstacle(wanted, device, config)
    if obstacle is not None:
        raise ConfigError(f"model.attention_backend is {wanted}, but {obstacle}; use auto or sdpa")
    return wanted


def _obstacle(backend: str, device: torch.device, config: TransformerConfig) -> str | None:
    """Why a fused backend cannot be used. None: it can."""
    channels = config.kv_channels or 0
    if device.type != "cuda":
        return "it needs a GPU"
    if config.params_dtype is not torch.bfloat16:
        return "its kernels have no fp32, which training.precision asks for"
    if channels % 8 or channels > _MOST_CHANNELS:
        return f"heads have {channels} channels, and its kernels take multiples of 8 up to {_MOST_CHANNELS}"
    if backend == "varlen":
        if not compat.have_varlen_attention():
            return "this torch or this GPU has none"
        return "it has no dropout, and model.attention_dropout is not 0" if config.attention_dropout else None
    if not compat.have_transformer_engine():
        return "TransformerEngine does not import"
    # It exchanges keys itself and expects each segment to be split over ranks.
    return "it does not go with parallel.context above 1" if config.context_parallel_size > 1 else None
