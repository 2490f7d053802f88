"""Mixtral: Mistral with a mixture of experts for each feed-forward layer.

Files carry one tensor an expert (``block_sparse_moe.experts.N.w1``), whichever version of transformers wrote them
with ``save_pretrained``. In memory transformers 5 holds all experts of a layer in one tensor; state dicts of that
form are read as well.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megatron_grit.config.schema import ModelConfig
from megatron_grit.convert.families import mistral
from megatron_grit.convert.param_map import Copy, Entry, ExpertOf, Family, Form, GatedFC1
from megatron_grit.errors import CheckpointError

HF_LAYER, LAYER = mistral.HF_LAYER, mistral.LAYER

HF_DEFAULTS: dict[str, Any] = {
    "sliding_window": None,
    "rope_theta": 1e6,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "router_aux_loss_coef": 0.001,
    "router_jitter_noise": 0.0,
}
"""What transformers takes for a key that is absent from config.json and that changes the arithmetic."""

EXPERTS: tuple[Entry, ...] = (
    Entry(
        LAYER + "mlp.router.weight",
        (
            Form(Copy(), {HF_LAYER + "block_sparse_moe.gate.weight": ("experts", "hidden")}),
            Form(Copy(), {HF_LAYER + "mlp.gate.weight": ("experts", "hidden")}),
        ),
    ),
    Entry(
        LAYER + "mlp.experts.local_experts.{expert}.linear_fc1.weight",
        (
            Form(
                GatedFC1(),
                {
                    HF_LAYER + "block_sparse_moe.experts.{expert}.w1.weight": ("ffn", "hidden"),
                    HF_LAYER + "block_sparse_moe.experts.{expert}.w3.weight": ("ffn", "hidden"),
                },
            ),
            Form(ExpertOf(), {HF_LAYER + "mlp.experts.gate_up_proj": ("experts", "gate_up", "hidden")}),
        ),
    ),
    Entry(
        LAYER + "mlp.experts.local_experts.{expert}.linear_fc2.weight",
        (
            Form(Copy(), {HF_LAYER + "block_sparse_moe.experts.{expert}.w2.weight": ("hidden", "ffn")}),
            Form(ExpertOf(), {HF_LAYER + "mlp.experts.down_proj": ("experts", "hidden", "ffn")}),
        ),
    ),
)


def model_config(hf: dict[str, Any]) -> ModelConfig:
    """Shape of a mixture from its config.json.

    Transformers' balancing loss is taken over all layers at once and counts each of a token's top_k visits; the
    engine's is a sum over layers of a loss that divides by top_k. router_aux_loss_coef is therefore multiplied by
    top_k / num_layers: exact for one layer, and for several where they route alike.

    Raises:
        CheckpointError: as :func:`megatron_grit.convert.families.mistral.model_config`.
    """
    hf = HF_DEFAULTS | hf
    if hf["router_jitter_noise"]:
        raise CheckpointError(f"router_jitter_noise is {hf['router_jitter_noise']}; only 0 is supported")
    dense, top_k = mistral.decoder_config(hf), hf["num_experts_per_tok"]
    return replace(
        dense,
        num_experts=hf["num_local_experts"],
        moe_top_k=top_k,
        moe_aux_loss_coeff=hf["router_aux_loss_coef"] * top_k / dense.num_layers,
    )


def hf_config(model: ModelConfig) -> dict[str, Any]:
    """config.json of a mixture."""
    return mistral.hf_config(model) | {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_local_experts": model.num_experts,
        "num_experts_per_tok": model.moe_top_k,
        "router_aux_loss_coef": model.moe_aux_loss_coeff * model.num_layers / model.moe_top_k,
        "router_jitter_noise": 0.0,
        "output_router_logits": False,
    }


FAMILY = Family(
    name="Mixtral",
    architecture="MixtralForCausalLM",
    entries=mistral.DECODER + EXPERTS,
    ignored=mistral.FAMILY.ignored,
    model_config=model_config,
    hf_config=hf_config,
)
