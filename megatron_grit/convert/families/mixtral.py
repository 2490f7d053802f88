"""Mixtral: Mistral with a mixture of experts for each feed-forward layer.

Files carry one tensor an expert (``block_sparse_moe.experts.N.w1``), whichever version of transformers wrote them
with ``save_pretrained``. In memory transformers 5 holds all experts of a layer in one tensor; state dicts of that
form are read as well.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megatron_grit.config.schema import ModelConfig
from megatron_grit.convert.families.keys import Keys
from megatron_grit.convert.families.llama_like import (
    DECODER,
    DEFAULTS,
    HF_LAYER,
    IGNORED,
    MLP,
    NULLABLE,
    read_shape,
    read_window,
    write_shape,
)
from megatron_grit.convert.families.mixture import (
    balancing_coefficient,
    from_balancing_coefficient,
    refuse_normalized_top_1,
    stacked_experts,
)
from megatron_grit.convert.param_map import Copy, Entry, Family, Form, GatedFC1
from megatron_grit.errors import CheckpointError

KEYS = Keys(
    defaults=DEFAULTS
    | {
        "vocab_size": 32000,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 4096 * 32,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "router_aux_loss_coef": 0.001,
        "router_jitter_noise": 0.0,
    },
    nullable=NULLABLE | {"head_dim": int, "sliding_window": int},
    aliases={"num_experts": "num_local_experts"},
)

EXPERT, HF_EXPERT = MLP + "experts.local_experts.{expert}.", HF_LAYER + "block_sparse_moe.experts.{expert}."
STACKED_FC1, STACKED_FC2 = stacked_experts(HF_LAYER + "mlp.experts.")

EXPERTS: tuple[Entry, ...] = (
    Entry(
        MLP + "router.weight",
        (
            Form(Copy(), {HF_LAYER + "block_sparse_moe.gate.weight": ("experts", "hidden")}),
            Form(Copy(), {HF_LAYER + "mlp.gate.weight": ("experts", "hidden")}),
        ),
    ),
    Entry(
        EXPERT + "linear_fc1.weight",
        (
            Form(
                GatedFC1(),
                {
                    HF_EXPERT + "w1.weight": ("expert_ffn", "hidden"),
                    HF_EXPERT + "w3.weight": ("expert_ffn", "hidden"),
                },
            ),
            STACKED_FC1,
        ),
    ),
    Entry(
        EXPERT + "linear_fc2.weight",
        (Form(Copy(), {HF_EXPERT + "w2.weight": ("hidden", "expert_ffn")}), STACKED_FC2),
    ),
)


def model_config(hf: dict[str, Any]) -> ModelConfig:
    """Shape of a mixture from its config.json.

    Raises:
        CheckpointError: an option that changes the arithmetic and is not supported.
    """
    hf = KEYS.read(hf)
    if hf["router_jitter_noise"]:
        raise CheckpointError(f"router_jitter_noise is {hf['router_jitter_noise']}; only 0 is supported")
    shape = replace(
        read_shape(hf, "MixtralForCausalLM"),
        sliding_window=read_window(hf),
        num_experts=hf["num_local_experts"],
        moe_top_k=hf["num_experts_per_tok"],
    )
    refuse_normalized_top_1(shape)
    return replace(shape, moe_aux_loss_coeff=balancing_coefficient(hf["router_aux_loss_coef"], shape))


def hf_config(model: ModelConfig) -> dict[str, Any]:
    """config.json of a mixture."""
    return write_shape(model, "MixtralForCausalLM", "mixtral") | {
        "sliding_window": model.sliding_window,
        "num_local_experts": model.num_experts,
        "num_experts_per_tok": model.moe_top_k,
        "router_aux_loss_coef": from_balancing_coefficient(model),
        "router_jitter_noise": 0.0,
        "output_router_logits": False,
    }


FAMILY = Family(
    name="Mixtral",
    architecture="MixtralForCausalLM",
    model_type="mixtral",
    entries=DECODER + EXPERTS,
    ignored=IGNORED,
    model_config=model_config,
    hf_config=hf_config,
)
