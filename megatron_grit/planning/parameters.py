"""Parameters of a model and of one process, counted from a configuration: all, those of adapters, and those trained.

The linear layers of a layer are one table, from which both their own parameters and those of their adapters follow.
tests/unit/planning/test_parameters.py compares with the model that is built.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from megatron_grit.config.adapter_shape import rank_of
from megatron_grit.config.checks.adapter import adapter_targets
from megatron_grit.config.embedding_shape import num_head_parameters
from megatron_grit.config.schema import ModelConfig, RunConfig
from megatron_grit.config.shape import (
    attention_widths,
    dense_layers,
    expert_width,
    has_attention_output_bias,
    has_mlp_bias,
    has_qkv_bias,
    head_channels,
    padded_vocabulary,
    reading_layers,
    stage_layers,
)


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """Parameters of a model, padding of the vocabulary included."""

    total: int
    """Of the whole model, each counted once."""
    active: int
    """That a token passes through: all but the experts that it does not visit."""
    rank_dense: int
    """On a process, experts left out."""
    rank_expert: int
    """Of the experts on a process."""

    @property
    def rank(self) -> int:
        """On a process."""
        return self.rank_dense + self.rank_expert


def expert_tensor_size(config: RunConfig) -> int:
    """Tensor parallel size of the experts."""
    return config.parallel.expert_tensor or config.parallel.tensor


class _Linear(NamedTuple):
    """One of Hugging Face's linear layers. Those that lead out of attention and of the feed-forward layer are split
    over tensor parallel ranks by their inputs, all others by their outputs."""

    name: str
    place: str
    """In its layer: self_attention, mlp ..."""
    inputs: int
    outputs: int
    has_bias: bool

    def share(self, tensor: int) -> tuple[int, int]:
        """Inputs and outputs on a rank."""
        if self.name in ("o_proj", "down_proj"):
            return self.inputs // tensor, self.outputs
        return self.inputs, self.outputs // tensor


_Count = Callable[[_Linear, int], int]
"""Parameters on a rank that belong to a linear layer, for a tensor parallel size."""


def _own(linear: _Linear, tensor: int) -> int:
    inputs, outputs = linear.share(tensor)
    return (inputs + linear.has_bias) * outputs


def _attention(model: ModelConfig) -> Iterator[_Linear]:
    queries, keys = attention_widths(model)
    for name, outputs in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
        yield _Linear(name, "self_attention", model.hidden_size, outputs, has_qkv_bias(model))
    yield _Linear("o_proj", "self_attention", queries, model.hidden_size, has_attention_output_bias(model))


def _feed_forward(model: ModelConfig, width: int, place: str) -> Iterator[_Linear]:
    for name in ("gate_proj", "up_proj") if model.activation == "swiglu" else ("up_proj",):
        yield _Linear(name, place, model.hidden_size, width, has_mlp_bias(model))
    yield _Linear("down_proj", place, width, model.hidden_size, has_mlp_bias(model))


def _linears(model: ModelConfig, layer: int, sizes: _Sizes, count: _Count) -> tuple[int, int]:
    """What belongs to the linear layers of a layer, on a rank: to those of its experts apart from all others."""
    dense = sum(count(linear, sizes.tensor) for linear in _attention(model))
    is_dense = layer in dense_layers(model)
    width = model.ffn_hidden_size if is_dense else model.moe_shared_ffn_hidden_size
    if width:
        dense += sum(
            count(linear, sizes.tensor)
            for linear in _feed_forward(model, width, "mlp" if is_dense else "mlp.shared_experts")
        )
    if is_dense:
        return dense, 0
    experts = _feed_forward(model, expert_width(model), "mlp.experts.local_experts.0")
    expert = sum(count(linear, sizes.expert_tensor) for linear in experts)
    return dense, (model.num_experts or 0) // sizes.expert * expert


class _Sizes(NamedTuple):
    """Ranks over which a layer is split."""

    tensor: int = 1
    expert: int = 1
    expert_tensor: int = 1

    @staticmethod
    def of_config(config: RunConfig) -> _Sizes:
        return _Sizes(config.parallel.tensor, config.parallel.expert, expert_tensor_size(config))


def _whole(model: ModelConfig, layer: int) -> int:
    """Parameters of a layer that every tensor parallel rank has: norms, router, the shared expert's gate."""
    norm = 1 if model.normalization == "rmsnorm" else 2
    count = norm * model.hidden_size * (1 if model.parallel_residual == "one_norm" else 2)
    count += norm * 2 * head_channels(model) * model.qk_norm
    if layer not in dense_layers(model):
        count += model.hidden_size * (model.num_experts or 0)
        count += model.hidden_size * bool(model.moe_shared_ffn_hidden_size and model.moe_shared_expert_gate)
    return count


def _reading(model: ModelConfig, layer: int, tensor: int) -> int:
    """Parameters on a rank of what reads neighbors in a layer: cross-attention, and in the first the encoder."""
    layers, retro = reading_layers(model), model.retro
    if layer not in layers:
        return 0
    norm = model.hidden_size * (1 if model.normalization == "rmsnorm" else 2)
    cross = norm + sum(_own(linear, tensor) for linear in _attention(model))
    count = cross + (retro.gate is None)
    if layer == layers[0]:
        dense = replace(model, num_experts=None)
        of_encoder = _whole(dense, layer) + _linears(dense, layer, _Sizes(tensor), _own)[0]
        count += retro.encoder_layers * of_encoder + (cross if retro.encoder_conditioning == "chunk" else 0)
    return count


def count_parameters(config: RunConfig, vocab_size: int, stage: int = 0) -> Parameters:
    """Parameters of the model and of one process, adapters left out.

    Args:
        vocab_size: of the model before padding.
        stage: pipeline stage of the process.
    """
    model, parallel = config.model, config.parallel

    def layers(numbers: Iterable[int], sizes: _Sizes) -> tuple[int, int]:
        found = [(_whole(model, layer), *_linears(model, layer, sizes, _own)) for layer in numbers]
        read = sum(_reading(model, layer, sizes.tensor) for layer in numbers)
        return read + sum(whole + dense for whole, dense, _ in found), sum(experts for _, _, experts in found)

    dense, experts = layers(range(model.num_layers), _Sizes())
    ends = _ends(config, vocab_size, 1)
    head = 0 if model.tie_embeddings else ends["output"]
    total = dense + experts + ends["input"] + ends["norm"] + ends["output bias"] + head
    num_experts = model.num_experts or 1
    unvisited = experts * (num_experts - min(model.moe_top_k, num_experts)) // num_experts
    rank, rank_expert = layers(stage_layers(config, stage), _Sizes.of_config(config))
    ends = _ends(config, vocab_size, parallel.tensor)
    first, last = stage == 0, stage == parallel.pipeline - 1
    rank += first * ends["input"] + last * (ends["norm"] + ends["output bias"])
    if last and not (model.tie_embeddings and first):  # a tied matrix has a copy on the last stage
        rank += ends["output"]
    return Parameters(total=total, active=total - unvisited, rank_dense=rank, rank_expert=rank_expert)


def count_adapters(config: RunConfig, stage: int) -> tuple[int, int]:
    """Parameters of a process's adapters: those of experts apart from all others. Experts count as the first one does.

    Args:
        stage: pipeline stage of the process.
    """
    targets, adapter = adapter_targets(config), config.adapter

    def of_adapter(layer: int, linear: _Linear, tensor: int) -> int:
        if linear.name not in targets:
            return 0
        inputs, outputs = linear.share(tensor)
        rank = rank_of(adapter, f"decoder.layers.{layer}.{linear.place}.{linear.name}")
        return rank * (inputs + outputs) + (outputs if adapter.kind == "dora" else 0)

    sizes = _Sizes.of_config(config)
    found = [
        _linears(config.model, layer, sizes, functools.partial(of_adapter, layer))
        for layer in stage_layers(config, stage)
    ]
    return sum(dense for dense, _ in found), sum(experts for _, experts in found)


def count_trained(config: RunConfig, base: Parameters, vocab_size: int, stage: int) -> tuple[int, int]:
    """Parameters of a process that have gradients and optimizer states: those of experts apart from all others.

    Of ``training.trainable`` only embeddings and head are counted exactly: norms and biases, which are few, not at all;
    with other patterns, which may name anything, the whole base is. ``training.frozen`` is not looked at. So the count
    is too high rather than too low.

    Args:
        base: from :func:`count_parameters`.
        vocab_size: of the model before padding.
        stage: pipeline stage of the process.
    """
    dense, experts = count_adapters(config, stage)
    named = set(config.training.trainable)
    if (not named and config.adapter.kind == "none") or named - {"norms", "biases", "embeddings", "head"}:
        return base.rank_dense + dense, base.rank_expert + experts
    ends = _ends(config, vocab_size, config.parallel.tensor)
    is_first, is_last = stage == 0, stage == config.parallel.pipeline - 1
    if "embeddings" in named:
        if is_first:
            dense += ends["input"]
        elif is_last and config.model.tie_embeddings:
            dense += ends["output"]
    if "head" in named and is_last:
        dense += ends["output"] + ends["output bias"]
    return dense + is_last * num_head_parameters(config), experts


def _ends(config: RunConfig, vocab_size: int, tensor: int) -> dict[str, int]:
    """Parameters outside the layers on a rank: input embedding, final norm with the embedding head, output layer."""
    model = config.model
    # Padded for the run's tensor parallel size, whoever asks.
    rows = padded_vocabulary(vocab_size, model.vocab_multiple, config.parallel.tensor) // tensor
    positions = model.max_position_embeddings if model.position_embedding == "learned_absolute" else 0
    return {
        "input": (rows + positions) * model.hidden_size,
        "norm": model.hidden_size * (1 if model.normalization == "rmsnorm" else 2) + num_head_parameters(config),
        "output": rows * model.hidden_size,
        "output bias": rows * model.add_output_bias,
    }
