"""Llama 2 and 3: biases where config.json asks for them, stretched RoPE since Llama 3.1."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megatron_grit.config.schema import ModelConfig
from megatron_grit.config.shape import has_attention_output_bias, has_mlp_bias
from megatron_grit.convert.families.llama_like import DECODER, FEED_FORWARD, IGNORED, read_shape, write_shape
from megatron_grit.convert.param_map import Family

HF_DEFAULTS: dict[str, Any] = {"rope_theta": 10000.0, "attention_bias": False, "mlp_bias": False}
"""What transformers takes for a key that is absent from config.json and that changes the arithmetic."""


def model_config(hf: dict[str, Any]) -> ModelConfig:
    """Shape from config.json."""
    hf = HF_DEFAULTS | hf
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
    entries=DECODER + FEED_FORWARD,
    ignored=IGNORED,
    model_config=model_config,
    hf_config=hf_config,
)
