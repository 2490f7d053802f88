"""Qwen2 (biases of queries, keys and values) and Qwen3 (norms of queries and keys), dense and with experts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megatron_grit.config.schema import ModelConfig
from megatron_grit.config.shape import (
    dense_layers,
    expert_width,
    has_attention_output_bias,
    has_qkv_bias,
    mixture_layers,
)
from megatron_grit.convert.families.keys import Keys
from megatron_grit.convert.families.llama_like import (
    DECODER,
    DEFAULTS,
    FEED_FORWARD,
    HF_MLP,
    IGNORED,
    MLP,
    NULLABLE,
    copied,
    gated,
    layer_types,
    read_shape,
    read_window,
    window_layers,
    write_shape,
)
from megatron_grit.convert.families.mixture import (
    balancing_coefficient,
    from_balancing_coefficient,
    refuse_normalized_top_1,
    stacked_experts,
)
from megatron_grit.convert.param_map import Copy, Entry, Family, Form
from megatron_grit.errors import CheckpointError

_SHARED_DEFAULTS: dict[str, Any] = DEFAULTS | {
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "rope_theta": 10000.0,
    "use_sliding_window": False,
    "sliding_window": 4096,
}
_DENSE_DEFAULTS = _SHARED_DEFAULTS | {"intermediate_size": 22016, "num_key_value_heads": 32, "max_window_layers": 28}
_MIXTURE_DEFAULTS = _SHARED_DEFAULTS | {
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "decoder_sparse_step": 1,
    "norm_topk_prob": False,
    "router_aux_loss_coef": 0.001,
}
_NULLABLE = NULLABLE | {"sliding_window": int}
_HEADS = {"num_key_value_heads": int}
_GIVEN = {"head_dim": int}
QWEN2_KEYS = Keys(defaults=_DENSE_DEFAULTS, nullable=_NULLABLE | _HEADS, only_given=_GIVEN)
QWEN3_KEYS = Keys(defaults=_DENSE_DEFAULTS | {"head_dim": 128, "attention_bias": False}, nullable=_NULLABLE | _HEADS)
QWEN2_MOE_KEYS = Keys(
    defaults=_MIXTURE_DEFAULTS
    | {
        "intermediate_size": 5632,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "max_window_layers": 28,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "num_experts_per_tok": 4,
        "num_experts": 60,
        "qkv_bias": True,
    },
    nullable=_NULLABLE | _HEADS | {"mlp_only_layers": list},
    only_given=_GIVEN,
)
QWEN3_MOE_KEYS = Keys(
    defaults=_MIXTURE_DEFAULTS
    | {
        "intermediate_size": 6144,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "moe_intermediate_size": 768,
        "num_experts_per_tok": 8,
        "num_experts": 128,
        "attention_bias": False,
    },
    nullable=_NULLABLE | {"mlp_only_layers": list},
    only_given=_GIVEN,
    aliases={"num_local_experts": "num_experts"},
)


def has_shared_expert(model: ModelConfig) -> bool:
    """Whether there is an expert that every token visits."""
    return model.moe_shared_ffn_hidden_size is not None


EXPERT, HF_EXPERT = MLP + "experts.local_experts.{expert}.", HF_MLP + "experts.{expert}."
SHARED, HF_SHARED = MLP + "shared_experts.", HF_MLP + "shared_expert."
STACKED_FC1, STACKED_FC2 = stacked_experts(HF_MLP + "experts.")

EXPERTS: tuple[Entry, ...] = (
    copied(MLP + "router.weight", HF_MLP + "gate.weight", ("experts", "hidden"), layers=mixture_layers),
    Entry(
        EXPERT + "linear_fc1.weight",
        (gated(HF_EXPERT, "weight", ("expert_ffn", "hidden")), STACKED_FC1),
        layers=mixture_layers,
    ),
    Entry(
        EXPERT + "linear_fc2.weight",
        (Form(Copy(), {HF_EXPERT + "down_proj.weight": ("hidden", "expert_ffn")}), STACKED_FC2),
        layers=mixture_layers,
    ),
    Entry(
        SHARED + "linear_fc1.weight",
        (gated(HF_SHARED, "weight", ("shared_ffn", "hidden")),),
        only_if=has_shared_expert,
        layers=mixture_layers,
    ),
    copied(
        SHARED + "linear_fc2.weight",
        HF_SHARED + "down_proj.weight",
        ("hidden", "shared_ffn"),
        only_if=has_shared_expert,
        layers=mixture_layers,
    ),
    copied(
        SHARED + "gate_weight",
        HF_MLP + "shared_expert_gate.weight",
        ("one", "hidden"),
        only_if=has_shared_expert,
        layers=mixture_layers,
    ),
)


def _with_windows(shape: ModelConfig, hf: dict[str, Any], default: list[bool]) -> ModelConfig:
    """The shape with the windows of ``layer_types``, or of a rule where it is absent.

    Raises:
        CheckpointError: layers with a window, which has no width; RoPE of its own for a type of layers.
    """
    rope = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    own = [kind for kind in ("full_attention", "sliding_attention") if kind in rope]
    if own:
        raise CheckpointError(f"rope_parameters has RoPE for {own[0]} alone; one RoPE for all layers is supported")
    window = hf["sliding_window"] if hf["use_sliding_window"] else None
    layers = window_layers(hf, default)
    if not layers:
        return shape
    if not window:
        why = (
            f"sliding_window is {'null' if window is None else 0}"
            if hf["use_sliding_window"]
            else "use_sliding_window is false"
        )
        raise CheckpointError(f"layer {layers[0]} has a sliding window, and {why}; transformers cannot compute that")
    every = len(layers) == shape.num_layers
    return replace(shape, sliding_window=window, window_layers=None if every else layers)


def _windows(model: ModelConfig) -> dict[str, Any]:
    return {
        "use_sliding_window": model.sliding_window is not None,
        "sliding_window": model.sliding_window,
        "layer_types": layer_types(model),
    }


def _dense_config(hf: dict[str, Any], architecture: str) -> ModelConfig:
    shape = read_shape(hf, architecture)
    has_windows = hf["use_sliding_window"] and hf["sliding_window"] is not None
    default = [has_windows and layer >= hf["max_window_layers"] for layer in range(shape.num_layers)]
    return _with_windows(shape, hf, default)


def qwen2_config(hf: dict[str, Any]) -> ModelConfig:
    """Shape of Qwen2 from config.json."""
    return replace(_dense_config(QWEN2_KEYS.read(hf), "Qwen2ForCausalLM"), add_qkv_bias=True)


def qwen3_config(hf: dict[str, Any]) -> ModelConfig:
    """Shape of Qwen3 from config.json."""
    hf = QWEN3_KEYS.read(hf)
    bias = hf["attention_bias"]
    shape = _dense_config(hf, "Qwen3ForCausalLM")
    return replace(shape, qk_norm=True, add_qkv_bias=bias, add_attention_output_bias=bias)


def _mixture_config(hf: dict[str, Any], architecture: str) -> ModelConfig:
    shape = read_shape(hf, architecture)
    dense = [
        layer
        for layer in range(shape.num_layers)
        if layer in (hf["mlp_only_layers"] or ()) or (layer + 1) % hf["decoder_sparse_step"]
    ]
    shape = replace(
        shape,
        num_experts=hf["num_experts"],
        moe_top_k=hf["num_experts_per_tok"],
        moe_ffn_hidden_size=hf["moe_intermediate_size"],
        moe_normalize_top_k=hf["norm_topk_prob"],
        moe_dense_layers=dense or None,
    )
    refuse_normalized_top_1(shape)
    return replace(shape, moe_aux_loss_coeff=balancing_coefficient(hf["router_aux_loss_coef"], shape))


def qwen2_moe_config(hf: dict[str, Any]) -> ModelConfig:
    """Shape of Qwen2-MoE from config.json."""
    hf = QWEN2_MOE_KEYS.read(hf)
    shape = replace(
        _mixture_config(hf, "Qwen2MoeForCausalLM"),
        add_qkv_bias=hf["qkv_bias"],
        moe_shared_ffn_hidden_size=hf["shared_expert_intermediate_size"],
        moe_shared_expert_gate=True,
    )
    has_windows, last = hf["use_sliding_window"], hf["max_window_layers"]
    default = [has_windows and layer % 2 == 0 and layer < last for layer in range(shape.num_layers)]
    return _with_windows(shape, hf, default)


def qwen3_moe_config(hf: dict[str, Any]) -> ModelConfig:
    """Shape of Qwen3-MoE from config.json; its window is for all layers."""
    hf = QWEN3_MOE_KEYS.read(hf)
    bias = hf["attention_bias"]
    window = read_window(hf | {"sliding_window": hf["sliding_window"] if hf["use_sliding_window"] else None})
    shape = replace(
        _mixture_config(hf, "Qwen3MoeForCausalLM"), qk_norm=True, add_qkv_bias=bias, add_attention_output_bias=bias
    )
    return replace(shape, sliding_window=window)


def _hf_dense(model: ModelConfig, architecture: str, model_type: str) -> dict[str, Any]:
    windows = _windows(model)
    full = [kind == "full_attention" for kind in windows["layer_types"]]
    # Readers that do not know layer_types go by this. vLLM, which gives every layer the window, refuses a mixture where
    # this is below num_layers.
    leading = [*full, False].index(False)
    return write_shape(model, architecture, model_type) | windows | {"max_window_layers": leading}


def qwen2_hf(model: ModelConfig) -> dict[str, Any]:
    """config.json of Qwen2."""
    return _hf_dense(model, "Qwen2ForCausalLM", "qwen2")


def qwen3_hf(model: ModelConfig) -> dict[str, Any]:
    """config.json of Qwen3."""
    return _hf_dense(model, "Qwen3ForCausalLM", "qwen3") | {"attention_bias": has_attention_output_bias(model)}


def _hf_mixture(model: ModelConfig, architecture: str, model_type: str) -> dict[str, Any]:
    return write_shape(model, architecture, model_type) | {
        "num_experts": model.num_experts,
        "num_experts_per_tok": model.moe_top_k,
        "moe_intermediate_size": expert_width(model),
        "norm_topk_prob": model.moe_normalize_top_k,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(dense_layers(model)),
        "router_aux_loss_coef": from_balancing_coefficient(model),
        "output_router_logits": False,
    }


def qwen2_moe_hf(model: ModelConfig) -> dict[str, Any]:
    """config.json of Qwen2-MoE."""
    return (
        _hf_mixture(model, "Qwen2MoeForCausalLM", "qwen2_moe")
        | _windows(model)
        | {
            "qkv_bias": has_qkv_bias(model),
            "shared_expert_intermediate_size": model.moe_shared_ffn_hidden_size,
            "max_window_layers": model.num_layers,
        }
    )


def qwen3_moe_hf(model: ModelConfig) -> dict[str, Any]:
    """config.json of Qwen3-MoE."""
    return _hf_mixture(model, "Qwen3MoeForCausalLM", "qwen3_moe") | {
        "use_sliding_window": model.sliding_window is not None,
        "sliding_window": model.sliding_window,
        "attention_bias": has_attention_output_bias(model),
    }


QWEN2 = Family(
    name="Qwen2",
    architecture="Qwen2ForCausalLM",
    model_type="qwen2",
    entries=DECODER + FEED_FORWARD,
    ignored=IGNORED,
    model_config=qwen2_config,
    hf_config=qwen2_hf,
)
QWEN3 = Family(
    name="Qwen3",
    architecture="Qwen3ForCausalLM",
    model_type="qwen3",
    entries=DECODER + FEED_FORWARD,
    ignored=IGNORED,
    model_config=qwen3_config,
    hf_config=qwen3_hf,
)
QWEN2_MOE = Family(
    name="Qwen2-MoE",
    architecture="Qwen2MoeForCausalLM",
    model_type="qwen2_moe",
    entries=DECODER + FEED_FORWARD + EXPERTS,
    ignored=IGNORED,
    model_config=qwen2_moe_config,
    hf_config=qwen2_moe_hf,
)
QWEN3_MOE = Family(
    name="Qwen3-MoE",
    architecture="Qwen3MoeForCausalLM",
    model_type="qwen3_moe",
    entries=DECODER + FEED_FORWARD + EXPERTS,
    ignored=IGNORED,
    model_config=qwen3_moe_config,
    hf_config=qwen3_moe_hf,
)
