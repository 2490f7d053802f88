"""Mistral: a sliding window over all layers, or none."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megatron_grit.config.schema import ModelConfig
from megatron_grit.convert.families.keys import Keys
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
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 4096 * 32,
        "sliding_window": 4096,
        "rope_theta": 10000.0,
    },
    nullable=NULLABLE | {"head_dim": int, "sliding_window": int},
)


def model_config(hf: dict[str, Any]) -> ModelConfig:
    """Shape from config.json."""
    hf = KEYS.read(hf)
    return replace(read_shape(hf, "MistralForCausalLM"), sliding_window=read_window(hf))


def hf_config(model: ModelConfig) -> dict[str, Any]:
    """config.json."""
    return write_shape(model, "MistralForCausalLM", "mistral") | {"sliding_window": model.sliding_window}


FAMILY = Family(
    name="Mistral",
    architecture="MistralForCausalLM",
    model_type="mistral",
    entries=DECODER + FEED_FORWARD,
    ignored=IGNORED,
    model_config=model_config,
    hf_config=hf_config,
)
