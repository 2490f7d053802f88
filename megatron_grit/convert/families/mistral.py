"""Mistral: a dense decoder with RMSNorm, SwiGLU, RoPE and grouped-query attention."""

from __future__ import annotations

from typing import Any

from megatron_grit.config.schema import ModelConfig
from megatron_grit.convert.param_map import Copy, Entry, Family, Form, GatedFC1, GroupedQKV, VocabularyRows
from megatron_grit.errors import CheckpointError

HF_LAYER = "model.layers.{layer}."
LAYER = "decoder.layers.{layer}."


HF_DEFAULTS: dict[str, Any] = {"sliding_window": 4096, "rope_theta": 10000.0}
"""What transformers takes for a key that is absent from config.json and that changes the arithmetic."""


def has_output_layer(model: ModelConfig) -> bool:
    """Whether the output layer has weights of its own."""
    return not model.tie_embeddings


DECODER: tuple[Entry, ...] = (
    Entry(
        "embedding.word_embeddings.weight",
        (Form(VocabularyRows(), {"model.embed_tokens.weight": ("vocab", "hidden")}),),
    ),
    Entry(
        LAYER + "input_layernorm.weight",
        (Form(Copy(), {HF_LAYER + "input_layernorm.weight": ("hidden",)}),),
    ),
    Entry(
        LAYER + "self_attention.linear_qkv.weight",
        (
            Form(
                GroupedQKV(),
                {
                    HF_LAYER + "self_attn.q_proj.weight": ("query", "hidden"),
                    HF_LAYER + "self_attn.k_proj.weight": ("key_value", "hidden"),
                    HF_LAYER + "self_attn.v_proj.weight": ("key_value", "hidden"),
                },
            ),
        ),
    ),
    Entry(
        LAYER + "self_attention.linear_proj.weight",
        (Form(Copy(), {HF_LAYER + "self_attn.o_proj.weight": ("hidden", "query")}),),
    ),
    Entry(
        LAYER + "pre_mlp_layernorm.weight",
        (Form(Copy(), {HF_LAYER + "post_attention_layernorm.weight": ("hidden",)}),),
    ),
    Entry(
        "decoder.final_layernorm.weight",
        (Form(Copy(), {"model.norm.weight": ("hidden",)}),),
    ),
    Entry(
        "output_layer.weight",
        (Form(VocabularyRows(), {"lm_head.weight": ("vocab", "hidden")}),),
        only_if=has_output_layer,
    ),
)
"""All but the feed-forward layers."""

FEED_FORWARD: tuple[Entry, ...] = (
    Entry(
        LAYER + "mlp.linear_fc1.weight",
        (
            Form(
                GatedFC1(),
                {
                    HF_LAYER + "mlp.gate_proj.weight": ("ffn", "hidden"),
                    HF_LAYER + "mlp.up_proj.weight": ("ffn", "hidden"),
                },
            ),
        ),
    ),
    Entry(
        LAYER + "mlp.linear_fc2.weight",
        (Form(Copy(), {HF_LAYER + "mlp.down_proj.weight": ("hidden", "ffn")}),),
    ),
)


def model_config(hf: dict[str, Any]) -> ModelConfig:
    """Shape of a decoder from its config.json.

    Raises:
        CheckpointError: an option that changes the arithmetic and is not supported, or a missing key.
    """
    return decoder_config(HF_DEFAULTS | hf)


def decoder_config(hf: dict[str, Any]) -> ModelConfig:
    """All but the experts, from a config.json whose defaults are filled in."""
    if hf.get("hidden_act", "silu") != "silu":
        raise CheckpointError(f"hidden_act is {hf['hidden_act']}; only silu is supported")
    try:
        return ModelConfig(
            num_layers=hf["num_hidden_layers"],
            hidden_size=hf["hidden_size"],
            ffn_hidden_size=hf["intermediate_size"],
            num_attention_heads=hf["num_attention_heads"],
            num_query_groups=hf.get("num_key_value_heads") or hf["num_attention_heads"],
            kv_channels=hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"],
            vocab_size=hf["vocab_size"],
            max_position_embeddings=hf["max_position_embeddings"],
            normalization="rmsnorm",
            norm_epsilon=hf["rms_norm_eps"],
            activation="swiglu",
            position_embedding="rope",
            rotary_base=rotary_base(hf),
            tie_embeddings=hf.get("tie_word_embeddings", False),
            sliding_window=hf["sliding_window"],
            attention_dropout=hf.get("attention_dropout", 0.0),
            init_std=hf.get("initializer_range", 0.02),
        )
    except KeyError as error:
        raise CheckpointError(f"key {error.args[0]} is missing from config.json") from None


def rotary_base(hf: dict[str, Any]) -> float:
    """RoPE's base: ``rope_parameters.rope_theta`` since transformers 5, ``rope_theta`` before.

    Raises:
        CheckpointError: scaled RoPE.
    """
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise CheckpointError(f"RoPE of type {kind} is not supported, only the default")
    return float(rope.get("rope_theta", hf["rope_theta"]))


def hf_config(model: ModelConfig) -> dict[str, Any]:
    """config.json of a decoder, readable by transformers 4 and 5."""
    return {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_query_groups or model.num_attention_heads,
        "head_dim": model.kv_channels or model.hidden_size // model.num_attention_heads,
        "hidden_act": "silu",
        "max_position_embeddings": model.max_position_embeddings,
        "initializer_range": model.init_std,
        "rms_norm_eps": model.norm_epsilon,
        "tie_word_embeddings": model.tie_embeddings,
        "rope_theta": model.rotary_base,
        "rope_parameters": {"rope_theta": model.rotary_base, "rope_type": "default"},
        "sliding_window": model.sliding_window,
        "attention_dropout": model.attention_dropout,
    }


FAMILY = Family(
    name="Mistral",
    architecture="MistralForCausalLM",
    entries=DECODER + FEED_FORWARD,
    ignored=(r".*\.rotary_emb\.inv_freq",),
    model_config=model_config,
    hf_config=hf_config,
)
