"""Mistral: a sliding window over all layers, or none."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megatron_grit.config.schema import ModelConfig
from megatron_grit.convert.families.llama_like import DECODER, FEED_FORWARD, IGNORED, read_shape, write_shape
from megatron_grit.convert.param_map import Family

HF_DEFAULTS: dict[str, Any] = {"sliding_window": 4096, "rope_theta": 10000.0}
"""What transformers takes for a key that is absent from config.json and that changes the arithmetic."""


def model_config(hf: dict[str, Any]) -> ModelConfig:
    """Shape from config.json."""
    hf = HF_DEFAULTS | hf
    return replace(read_shape(hf, "MistralForCausalLM"), sliding_window=hf["sliding_window"])


def hf_config(model: ModelConfig) -> dict[str, Any]:
    """config.json."""
    return write_shape(model, "MistralForCausalLM", "mistral") | {"sliding_window": model.sliding_window}


FAMILY = Family(
    name="Mistral",
    architecture="MistralForCausalLM",
    entries=DECODER + FEED_FORWARD,
    ignored=IGNORED,
    model_config=model_config,
    hf_config=hf_config,
)
