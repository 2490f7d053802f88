"""Layers that read, and the encoder of what they read.

Order of a layer that reads: self-attention, cross-attention, feed-forward layer, each after a norm and added to the
residual stream.

Shape suffix legend: T = tokens of a row, N = tokens of all neighbors, D = width.
"""

from __future__ import annotations

import copy
import functools
import typing
from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor

from megatron_grit.config.schema import ModelConfig
from megatron_grit.models.norms import norm_class
from megatron_grit.models.retro.cross_attention import GroupedCrossAttention, unused
from megatron_grit.models.retro.passes import Chunk, NeighborCache, PassPlan, PassSegments
from megatron_grit.models.retro.plan import EncodingPlan, Groups, RetroSegments
from megatron_grit.models.rope import RotaryAngles


class CrossLayer(TransformerLayer):
    """The engine's layer with cross-attention in groups."""

    def __init__(
        self, config: TransformerConfig, submodules: TransformerLayerSubmodules, *, model: ModelConfig, **options: Any
    ) -> None:
        super().__init__(config, submodules, **options)
        self.pre_cross_attn_layernorm = norm_class(model.normalization)(
            config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon
        )
        self.cross_attention = GroupedCrossAttention(config, config.attention_dropout, self.gate_of(model))
        self.parity = False
        """As an encoder layer of megatron-core 0.15."""

    def gate_of(self, model: ModelConfig) -> float | None:
        """Factor of what cross-attention adds; None: learned."""
        return 1.0

    def attend_to_itself(self, states: Tensor, options: dict[str, Any]) -> Tensor:
        """States after self-attention."""
        output = self.self_attention(
            self.input_layernorm(states),
            attention_mask=None,
            rotary_pos_emb=options.get("rotary_pos_emb"),
            packed_seq_params=options.get("packed_seq_params"),
        )
        with self.bias_dropout_add_exec_handler():
            after: Tensor = self.self_attn_bda(self.training, False)(output, states, self.hidden_dropout)
        return after

    def read(self, states: Tensor, normed: Tensor, asked: Tensor, groups: Groups) -> Tensor:
        """States after cross-attention.

        Args:
            states: [T, 1, D] after self-attention.
            normed: the same after the norm before cross-attention.
            asked: states that are attended to.
            groups: who attends to what.
        """
        return self.add(states, normed, self.cross_attention(normed, asked, groups))

    def add(self, states: Tensor, normed: Tensor, output: Tensor) -> Tensor:
        """States with what cross-attention has read."""
        residual = normed if self.parity else states
        after: Tensor = self.self_attn_bda(self.training, False)((output, None), residual, self.hidden_dropout)
        return after


class EncoderLayer(CrossLayer):
    """The first layer of the encoder where it is conditioned: neighbors attend to the chunk that reads them."""

    def forward(self, hidden_states: Tensor, chunks: Tensor, groups: Groups, **options: Any) -> Tensor:
        """Encode neighbors.

        Args:
            hidden_states: [N, 1, D] of the neighbors.
            chunks: [T, 1, D] of the row.
            groups: of the plan.
            options: of the engine's layer.

        Returns:
            [N, 1, D].
        """
        states = self.attend_to_itself(hidden_states, options)
        if self.parity:
            chunks = torch.cat([chunks, torch.zeros_like(chunks[:1])])
        states = self.read(states, self.pre_cross_attn_layernorm(states), chunks, groups)
        after: Tensor = self._forward_mlp(states)
        return after


class NeighborEncoder(MegatronModule):
    """A bidirectional transformer over neighbors, each a segment of a packed row, without a norm at its end.

    Args:
        config: the engine's configuration of the encoder, :func:`encoder_config`.
        model: the decoder's shape.
        specs: of its layers.
        device: where the model computes.
    """

    def __init__(self, config: TransformerConfig, model: ModelConfig, specs: list[Any], device: torch.device) -> None:
        super().__init__(config=config)
        self.layers = torch.nn.ModuleList(
            build_module(spec, config=config, layer_number=number) for number, spec in enumerate(specs, 1)
        )
        self.is_conditioned = model.retro.encoder_conditioning == "chunk"
        """Whether its first layer attends to the chunk that reads a neighbor."""
        rotates = model.position_embedding == "rope" and model.retro.encoder_rope and model.retro.parity == "none"
        self.rotary_angles = RotaryAngles(model, device) if rotates else None
        for layer in self.layers:
            if isinstance(layer, EncoderLayer):
                layer.parity = model.retro.parity == "core"

    def forward(self, texts_N1D: Tensor, chunks_T1D: Tensor, plan: EncodingPlan) -> Tensor:
        """States of the neighbors, [N, 1, D].

        Args:
            texts_N1D: embeddings of their tokens.
            chunks_T1D: states of the row that reads them, after a norm.
            plan: of the row.
        """
        angles = None if self.rotary_angles is None else self.rotary_angles(plan.positions_N)
        options: dict[str, Any] = {"rotary_pos_emb": angles, "packed_seq_params": plan.texts}
        states = texts_N1D
        for layer in self.layers:
            if isinstance(layer, EncoderLayer):
                assert plan.conditioning is not None
                states = layer(states, chunks_T1D, plan.conditioning, **options)
            else:
                states, _ = layer(states, attention_mask=None, **options)
        return states

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """Each layer's, under its number."""
        state: dict[str, Any] = {}
        for number, layer in enumerate(self.layers):
            layer = typing.cast(TransformerLayer, layer)
            state |= layer.sharded_state_dict(f"{prefix}layers.{number}.", sharded_offsets, metadata)
        return state


class RetroLayer(CrossLayer):
    """A layer of the decoder that reads neighbors. The first one encodes them."""

    def __init__(self, *args: Any, model: ModelConfig, encoder: Any = None, **options: Any) -> None:
        super().__init__(*args, model=model, **options)
        self.encoder: NeighborEncoder | None = None if encoder is None else encoder()

    def gate_of(self, model: ModelConfig) -> float | None:
        """As configured."""
        return model.retro.gate

    def forward(self, hidden_states: Tensor, *_: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        """A layer over a row.

        Args:
            hidden_states: [T, 1, D].
            options: of the engine's layer; ``context`` are the neighbors, [N, 1, D]: embeddings of their tokens at the
                first layer that reads, and their encodings from there on.

        Returns:
            (states after the layer, the encoded neighbors).
        """
        states = self.attend_to_itself(hidden_states, options)
        segments, context = options.get("packed_seq_params"), options.get("context")
        if isinstance(segments, PassSegments):
            assert segments.plan is not None and segments.cache is not None
            states, context = self._read_pass(states, context, segments.lengths, segments.plan, segments.cache)
            return self._forward_mlp(states, padding_mask=options.get("padding_mask")), context
        plan = segments.plan if isinstance(segments, RetroSegments) else None
        if plan is None or context is None:
            states = states + unused(self.pre_cross_attn_layernorm, states) + unused(self.cross_attention, states)
            if self.encoder is not None:
                states = states + unused(self.encoder, states)
        else:
            normed = self.pre_cross_attn_layernorm(states)
            if self.encoder is not None:
                context = self.encoder(context, normed, plan)
            states = self.read(states, normed, context, plan.reading)
        return self._forward_mlp(states, padding_mask=options.get("padding_mask")), context

    def _read_pass(
        self, states: Tensor, texts: Tensor | None, lengths: list[int], plan: PassPlan, cache: NeighborCache
    ) -> tuple[Tensor, Tensor | None]:
        """As :meth:`forward` in a pass of generation: states after cross-attention, and the encoded new neighbors."""
        normed = self.pre_cross_attn_layernorm(states)
        if self.encoder is not None:
            chunks = self._chunks(normed, lengths, plan.chunks, cache) if self.encoder.is_conditioned else normed
            if plan.encoding is not None:
                assert texts is not None
                texts = self.encoder(texts, chunks, plan.encoding)
            if plan.texts:
                texts = cache.join_encodings(plan.texts, plan.parts(texts))
        output = self.cross_attention.read_pass(normed, texts, plan, cache, self.layer_number)
        return self.add(states, normed, output), texts

    @staticmethod
    def _chunks(normed: Tensor, lengths: list[int], chunks: list[Chunk], cache: NeighborCache) -> Tensor:
        """States that new neighbors are conditioned on, chunk after chunk."""
        kept = [cache.extend_states(segment, part) for segment, part in enumerate(normed[:, 0].split(lengths))]
        parts = []
        for chunk in chunks:
            end = len(kept[chunk.segment])
            parts.append(kept[chunk.segment][end - chunk.before_end.start : end - chunk.before_end.stop])
        return torch.cat(parts)[:, None] if parts else normed


@functools.cache
def carrying(layer: type[TransformerLayer]) -> type[TransformerLayer]:
    """The class of a layer at the end of a pipeline stage: it sends the neighbors along behind the row."""

    class Carrying(layer):  # type: ignore[misc, valid-type]
        def forward(self, *args: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
            states, context = super().forward(*args, **options)
            return (states if context is None else torch.cat([states, context])), context

    return Carrying


def encoder_config(config: TransformerConfig, model: ModelConfig) -> TransformerConfig:
    """The engine's configuration of the encoder: the decoder's, on one pipeline stage and without experts."""
    changed = copy.copy(config)
    changed.num_layers = model.retro.encoder_layers
    changed.pipeline_model_parallel_size, changed.virtual_pipeline_model_parallel_size = 1, None
    changed.num_moe_experts, changed.moe_layer_freq = None, 1
    changed.hidden_dropout = model.retro.encoder_hidden_dropout
    changed.attention_dropout = model.retro.encoder_attention_dropout
    changed.recompute_granularity = changed.recompute_method = changed.recompute_num_layers = None
    return changed
