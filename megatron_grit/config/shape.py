"""What follows from a model's shape."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import asdict
from typing import Any

from megatron_grit.config.knob import names_with
from megatron_grit.config.schema import ModelConfig, RunConfig


def computing_settings(config: RunConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options of the model, and of its adapters, that its outputs follow from beside its weights: what is computed with
    a model and kept is of no use under others."""
    return _without(config.model, "in_weights", False), _without(config.adapter, "may_change", True)


def _without(section: Any, fact: str, value: bool) -> dict[str, Any]:
    """The options of a section, those marked by the fact left out."""
    left_out = names_with(type(section), fact, value)
    return {name: held for name, held in asdict(section).items() if name not in left_out}


def head_channels(model: ModelConfig) -> int:
    """Channels of a head."""
    return model.kv_channels or model.hidden_size // model.num_attention_heads


def num_query_groups(model: ModelConfig) -> int:
    """Key and value heads."""
    return model.num_query_groups or model.num_attention_heads


def attention_widths(model: ModelConfig) -> tuple[int, int]:
    """Channels of all query heads, and of all key heads."""
    return model.num_attention_heads * head_channels(model), num_query_groups(model) * head_channels(model)


def expert_width(model: ModelConfig) -> int:
    """Feed-forward width of an expert."""
    return model.moe_ffn_hidden_size or model.ffn_hidden_size


def query_scale(model: ModelConfig) -> float:
    """What multiplies the products of queries and keys, where RoPE does not."""
    return head_channels(model) ** -0.5 if model.attention_scale is None else model.attention_scale


_DERIVED: dict[str, Callable[[ModelConfig], float]] = {
    "kv_channels": head_channels,
    "num_query_groups": num_query_groups,
    "moe_ffn_hidden_size": expert_width,
    "attention_scale": query_scale,
}


def effective(model: ModelConfig, name: str) -> Any:
    """Value of an option, its default filled in."""
    return _DERIVED[name](model) if name in _DERIVED else getattr(model, name)


def padded_vocabulary(vocab_size: int, multiple: int, tensor_size: int) -> int:
    """Rows of the embedding matrix: a multiple that tensor parallel ranks divide evenly."""
    step = multiple * tensor_size
    return -(-vocab_size // step) * step


def dense_layers(model: ModelConfig) -> Collection[int]:
    """Layers with one feed-forward layer rather than experts."""
    return range(model.num_layers) if model.num_experts is None else model.moe_dense_layers or ()


def mixture_layers(model: ModelConfig) -> Collection[int]:
    """Layers with experts."""
    return sorted(set(range(model.num_layers)).difference(dense_layers(model)))


def window_of_layer(model: ModelConfig, layer: int) -> int | None:
    """The sliding window of a layer, counted from 0. None: it has none."""
    return model.sliding_window if model.window_layers is None or layer in model.window_layers else None


def stage_layers(config: RunConfig, stage: int) -> list[int]:
    """Layers of a pipeline stage; an interleaved one holds several runs of them."""
    stages, chunks = config.parallel.pipeline, config.parallel.virtual_pipeline or 1
    size = config.model.num_layers // (stages * chunks)
    firsts = [(chunk * stages + stage) * size for chunk in range(chunks)]
    return [layer for first in firsts for layer in range(first, first + size)]


def has_qkv_bias(model: ModelConfig) -> bool:
    """Whether queries, keys and values have biases."""
    return model.add_bias_linear or model.add_qkv_bias


def has_attention_output_bias(model: ModelConfig) -> bool:
    """Whether the output projection of attention has a bias."""
    return model.add_bias_linear or model.add_attention_output_bias


def has_mlp_bias(model: ModelConfig) -> bool:
    """Whether feed-forward layers have biases."""
    return model.add_bias_linear or model.add_mlp_bias


def reads_neighbors(model: ModelConfig) -> bool:
    """Whether rows of a model carry what it reads: not where a gate that is 0 shuts all of it out."""
    return model.retro.num_neighbors > 0 and model.retro.gate != 0


def reading_layers(model: ModelConfig) -> list[int]:
    """Layers, from 0, with cross-attention to neighbors; none where the model reads none."""
    retro = model.retro
    if not retro.num_neighbors:
        return []
    if retro.layers is not None:
        return sorted(retro.layers)
    return list(range(5 if model.num_layers <= 15 else 8, model.num_layers, 3))


def read_tokens(model: ModelConfig) -> float:
    """Neighbor tokens for each token of a row: at most, where every chunk has all its neighbors."""
    if not reading_layers(model):
        return 0.0
    return model.retro.num_neighbors * neighbor_tokens(model) / model.retro.chunk_length


def neighbor_tokens(model: ModelConfig) -> int:
    """Most tokens of a neighbor."""
    return model.retro.retrieved_chunks * model.retro.chunk_length
