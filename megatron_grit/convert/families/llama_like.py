"""What Llama, Mistral, Qwen and their mixtures share: RMSNorm, SwiGLU, RoPE, grouped-query attention, and names.

Lines of the table that not all of them have (biases, norms of queries and keys) count where the model's shape says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from megatron_grit.config.schema import ModelConfig
from megatron_grit.config.shape import (
    dense_layers,
    has_attention_output_bias,
    has_mlp_bias,
    has_qkv_bias,
    head_channels,
    num_query_groups,
    window_of_layer,
)
from megatron_grit.convert.families.keys import check_heads
from megatron_grit.convert.param_map import Copy, Entry, Form, GatedFC1, GroupedQKV, VocabularyRows
from megatron_grit.convert.rope_parameters import read_rope, write_rope
from megatron_grit.errors import CheckpointError

HF_LAYER = "model.layers.{layer}."
LAYER = "decoder.layers.{layer}."
IGNORED = (r".*\.rotary_emb\.inv_freq",)


def copied(megatron: str, hf: str, shape: tuple[str, ...], **options: Any) -> Entry:
    """A line for a tensor that is the same on both sides."""
    return Entry(megatron, (Form(Copy(), {hf: shape}),), **options)


def has_output_layer(model: ModelConfig) -> bool:
    """Whether the output layer has weights of its own."""
    return not model.tie_embeddings


def has_qk_norm(model: ModelConfig) -> bool:
    """Whether the heads of queries and keys are normalised."""
    return model.qk_norm


def qkv(kind: str, prefix: str, shape: tuple[str, ...]) -> Form:
    """Three projections as one."""
    names = [f"{prefix}{letter}_proj.{kind}" for letter in "qkv"]
    return Form(GroupedQKV(), dict(zip(names, [("query", *shape), *2 * [("key_value", *shape)]], strict=True)))


def gated(prefix: str, kind: str, shape: tuple[str, ...]) -> Form:
    """Gate and up projection as one."""
    return Form(GatedFC1(), {f"{prefix}gate_proj.{kind}": shape, f"{prefix}up_proj.{kind}": shape})


ATTENTION, HF_ATTENTION = LAYER + "self_attention.", HF_LAYER + "self_attn."

DECODER: tuple[Entry, ...] = (
    Entry(
        "embedding.word_embeddings.weight",
        (Form(VocabularyRows(), {"model.embed_tokens.weight": ("vocab", "hidden")}),),
    ),
    copied(LAYER + "input_layernorm.weight", HF_LAYER + "input_layernorm.weight", ("hidden",)),
    Entry(ATTENTION + "linear_qkv.weight", (qkv("weight", HF_ATTENTION, ("hidden",)),)),
    Entry(ATTENTION + "linear_qkv.bias", (qkv("bias", HF_ATTENTION, ()),), only_if=has_qkv_bias),
    copied(ATTENTION + "q_layernorm.weight", HF_ATTENTION + "q_norm.weight", ("head",), only_if=has_qk_norm),
    copied(ATTENTION + "k_layernorm.weight", HF_ATTENTION + "k_norm.weight", ("head",), only_if=has_qk_norm),
    copied(ATTENTION + "linear_proj.weight", HF_ATTENTION + "o_proj.weight", ("hidden", "query")),
    copied(
        ATTENTION + "linear_proj.bias", HF_ATTENTION + "o_proj.bias", ("hidden",), only_if=has_attention_output_bias
    ),
    copied(LAYER + "pre_mlp_layernorm.weight", HF_LAYER + "post_attention_layernorm.weight", ("hidden",)),
    copied("decoder.final_layernorm.weight", "model.norm.weight", ("hidden",)),
    Entry(
        "output_layer.weight",
        (Form(VocabularyRows(), {"lm_head.weight": ("vocab", "hidden")}),),
        only_if=has_output_layer,
    ),
)
"""All but the feed-forward layers."""

MLP, HF_MLP = LAYER + "mlp.", HF_LAYER + "mlp."

FEED_FORWARD: tuple[Entry, ...] = (
    Entry(MLP + "linear_fc1.weight", (gated(HF_MLP, "weight", ("ffn", "hidden")),), layers=dense_layers),
    Entry(MLP + "linear_fc1.bias", (gated(HF_MLP, "bias", ("ffn",)),), only_if=has_mlp_bias, layers=dense_layers),
    copied(MLP + "linear_fc2.weight", HF_MLP + "down_proj.weight", ("hidden", "ffn"), layers=dense_layers),
    copied(MLP + "linear_fc2.bias", HF_MLP + "down_proj.bias", ("hidden",), only_if=has_mlp_bias, layers=dense_layers),
)


DEFAULTS: dict[str, Any] = {
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_size": 4096,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_dropout": 0.0,
}
"""What transformers takes for a key that is absent from config.json, in all families but those that say otherwise."""
NULLABLE: dict[str, type] = {"rope_theta": float, "layer_types": list}
_LAYER_TYPES = {"attention": "full_attention", "full_attention": "full_attention"}
_LAYER_TYPES["sliding_attention"] = "sliding_attention"
"""Types of layers that are known here, and transformers' names of them."""


def read_shape(hf: dict[str, Any], architecture: str) -> ModelConfig:
    """A decoder's shape from a config.json whose defaults are filled in; windows, biases and experts are the family's.

    Raises:
        CheckpointError: an option that changes the arithmetic and is not supported.
    """
    if hf["hidden_act"] not in ("silu", "swish"):
        raise CheckpointError(f"hidden_act is {hf['hidden_act']}; only silu is supported")
    if hf.get("head_dim") is None:
        check_heads(hf["hidden_size"], hf["num_attention_heads"])
    shape = ModelConfig(
        architecture=architecture,
        num_layers=hf["num_hidden_layers"],
        hidden_size=hf["hidden_size"],
        ffn_hidden_size=hf["intermediate_size"],
        num_attention_heads=hf["num_attention_heads"],
        num_query_groups=hf["num_key_value_heads"] or hf["num_attention_heads"],
        kv_channels=hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"],
        vocab_size=hf["vocab_size"],
        max_position_embeddings=hf["max_position_embeddings"],
        normalization="rmsnorm",
        norm_epsilon=hf["rms_norm_eps"],
        activation="swiglu",
        position_embedding="rope",
        tie_embeddings=hf["tie_word_embeddings"],
        attention_dropout=hf["attention_dropout"],
        init_std=hf["initializer_range"],
    )
    rope = read_rope(hf)
    if rope["rope_type"] == "default":
        rope["rotary_percent"] = 1.0  # transformers' code of these families turns whole heads, whatever the file says
    elif rope["rotary_percent"] != 1:
        raise CheckpointError(
            f"partial_rotary_factor is {rope['rotary_percent']} with RoPE of type {rope['rope_type']}, which "
            f"transformers does not compute for {architecture}"
        )
    return replace(shape, **rope)


def write_shape(model: ModelConfig, architecture: str, model_type: str) -> dict[str, Any]:
    """config.json of a decoder, readable by transformers 4 and 5; windows, biases and experts are the family's."""
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": num_query_groups(model),
        "head_dim": head_channels(model),
        "hidden_act": "silu",
        "max_position_embeddings": model.max_position_embeddings,
        "initializer_range": model.init_std,
        "rms_norm_eps": model.norm_epsilon,
        "tie_word_embeddings": model.tie_embeddings,
        "attention_dropout": model.attention_dropout,
        **write_rope(model),
    }


def window_layers(hf: dict[str, Any], default: Sequence[bool]) -> list[int]:
    """Layers with a sliding window: those of ``layer_types``, or the family's rule.

    Raises:
        CheckpointError: not one type for each layer, or one that is not known here.
    """
    types = hf["layer_types"]
    if types is None:
        return [layer for layer, windowed in enumerate(default) if windowed]
    if len(types) != hf["num_hidden_layers"]:
        raise CheckpointError(f"layer_types has {len(types)} entries for {hf['num_hidden_layers']} layers")
    unknown = [kind for kind in map(str, types) if kind not in _LAYER_TYPES]
    if unknown:
        raise CheckpointError(f"layer_types has {unknown[0]!r}; only {', '.join(_LAYER_TYPES)} are supported")
    return [layer for layer, kind in enumerate(types) if _LAYER_TYPES[kind] == "sliding_attention"]


def read_window(hf: dict[str, Any]) -> int | None:
    """``sliding_window`` of a family whose layers all have it.

    Raises:
        CheckpointError: it is 0, or ``layer_types`` says that only some layers have one.
    """
    window: int | None = hf.get("sliding_window")
    every = hf["num_hidden_layers"]
    windowed = len(window_layers(hf, [window is not None] * every))
    if hf["layer_types"] is not None and windowed != (0 if window is None else every):
        raise CheckpointError(
            f"layer_types has {windowed} of {every} layers with a sliding window, and sliding_window is "
            f"{'null' if window is None else window}: transformers computes with and without its cache differently; "
            "leave layer_types out, then sliding_window counts for all layers"
        )
    if window == 0:
        raise CheckpointError("sliding_window is 0; give null, or the tokens that a layer sees")
    return window


def layer_types(model: ModelConfig) -> list[str]:
    """``layer_types`` of config.json."""
    has_window = [window_of_layer(model, layer) is not None for layer in range(model.num_layers)]
    return ["sliding_attention" if windowed else "full_attention" for windowed in has_window]
