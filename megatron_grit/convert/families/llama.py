"""Llama 2 and 3: biases where config.json asks for them, stretched RoPE since Llama 3.1."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megatron_grit.config.schema import ModelConfig
from megatron_grit.config.shape import has_attention_output_bias, has_mlp_bias
from megatron_grit.convert.families.keys import Keys, check_heads
from megatron_grit.convert.families.llama_like import (
    DECODER,
    DEFAULTS,
    FEED_FORWARD,
    IGNORED,
    NULLABLE,
    read_shape,
    read_window,
    write_shape,
)
from megatron_grit.convert.param_map import Family

KEYS = Keys(
    defaults=DEFAULTS
    | {
        "vocab_size": 32000,
        "intermediate_size": 11008,
        "max_position_embeddings": 2048,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "mlp_bias": False,
    },
    nullable=NULLABLE | {"num_key_value_heads": int, "head_dim": int},
)


def model_config(hf: dict[str, Any]) -> ModelConfig:
    """Shape from config.json."""
    hf = KEYS.read(hf)
    check_heads(hf["hidden_size"], hf["num_attention_heads"])
    read_window(hf | {"sliding_window": None})
    return replace(
        read_shape(hf, "LlamaForCausalLM"),
        add_qkv_bias=hf["attention_bias"],
        add_attention_output_bias=hf["attention_bias"],
        add_mlp_bias=hf["mlp_bias"],
    )


def hf_config(model: ModelConfig) -> dict[str, Any]:
    """config.json."""
    return write_shape(model, "LlamaForCausalLM", "llama") | {
        "attention_bias": has_attention_output_bias(model),
        "mlp_bias": has_mlp_bias(model),
    }


FAMILY = Family(
    name="Llama",
    architecture="LlamaForCausalLM",
    model_type="llama",
    entries=DECODER + FEED_FORWARD,
    ignored=IGNORED,
    model_config=model_config,
    hf_config=hf_config,
)
