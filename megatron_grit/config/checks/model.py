"""Checks of the model's shape by itself."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_grit.config.checks.problem import Problem
from megatron_grit.config.checks.retro import retro_problems
from megatron_grit.config.schema import ModelConfig, RunConfig
from megatron_grit.config.shape import head_channels, num_query_groups


def model_problems(config: RunConfig) -> Iterator[Problem]:
    """What in the model's shape contradicts itself."""
    model = config.model
    heads, groups = model.num_attention_heads, num_query_groups(model)
    if heads % groups:
        yield Problem(
            "model.num_query_groups",
            f"model.num_query_groups {groups} does not divide model.num_attention_heads {heads}",
        )
    if model.kv_channels is None and model.hidden_size % heads:
        yield Problem(
            "model.num_attention_heads",
            f"model.num_attention_heads {heads} does not divide model.hidden_size {model.hidden_size}; "
            "change one of them or set model.kv_channels",
        )
        return
    channels = head_channels(model)
    turned = channels * model.rotary_percent
    if model.position_embedding == "rope" and (turned != int(turned) or turned % 2):
        yield Problem(
            "model.rotary_percent" if model.rotary_percent != 1 else "model.num_attention_heads",
            f"RoPE turns pairs of channels, but model.rotary_percent {model.rotary_percent} of {channels} "
            f"channels of a head is {turned:g}",
        )
    if model.num_experts is not None and model.moe_top_k > model.num_experts:
        yield Problem(
            "model.moe_top_k", f"model.moe_top_k {model.moe_top_k} is above model.num_experts {model.num_experts}"
        )
    yield from _rope(model)
    yield from _layers(model)
    yield from retro_problems(config)
    if model.attention_backend in ("varlen", "te") and config.parallel.device == "cpu":
        yield Problem(
            "model.attention_backend",
            f"model.attention_backend {model.attention_backend} needs a GPU, but parallel.device is cpu; use auto",
        )


def _rope(model: ModelConfig) -> Iterator[Problem]:
    kind = model.rope_type
    if kind in ("llama3", "yarn") and model.rope_original_length is None:
        yield Problem("model.rope_original_length", f"model.rope_type {kind} needs model.rope_original_length")
    if kind == "llama3" and model.rope_low_freq_factor >= model.rope_high_freq_factor:
        yield Problem(
            "model.rope_high_freq_factor",
            f"model.rope_high_freq_factor {model.rope_high_freq_factor} is not above model.rope_low_freq_factor "
            f"{model.rope_low_freq_factor}",
        )
    if kind == "yarn" and model.rotary_percent != 1:
        yield Problem(
            "model.rotary_percent",
            f"model.rope_type yarn with model.rotary_percent {model.rotary_percent} is not supported; only 1 is",
        )


def _layers(model: ModelConfig) -> Iterator[Problem]:
    for name in ("window_layers", "moe_dense_layers"):
        outside = [layer for layer in getattr(model, name) or () if not 0 <= layer < model.num_layers]
        if outside:
            yield Problem(
                f"model.{name}", f"model.{name} has layer {outside[0]}, but layers are 0 to {model.num_layers - 1}"
            )
    if model.num_experts is None:
        return
    if model.parallel_residual != "none":
        yield Problem(
            "model.parallel_residual", "model.parallel_residual does not go with model.num_experts; set it to none"
        )
    for name in ("add_bias_linear", "add_mlp_bias"):
        if getattr(model, name):
            yield Problem(
                f"model.{name}", f"model.{name} gives experts biases, which they cannot have; set it to false"
            )
    if model.add_attention_output_bias and model.moe_shared_ffn_hidden_size is not None:
        yield Problem(
            "model.add_attention_output_bias",
            "model.add_attention_output_bias does not go with model.moe_shared_ffn_hidden_size: a shared expert would "
            "have biases too; set it to false",
        )
