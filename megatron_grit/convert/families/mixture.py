"""What families with experts share."""

from __future__ import annotations

from megatron_grit.config.schema import ModelConfig
from megatron_grit.config.shape import mixture_layers
from megatron_grit.convert.param_map import ExpertOf, Form, GatedExpertOf
from megatron_grit.errors import CheckpointError


def stacked_experts(prefix: str) -> tuple[Form, Form]:
    """First and second linear layer of one expert, where all experts of a layer are in one tensor."""
    return (
        Form(GatedExpertOf(), {prefix + "gate_up_proj": ("experts", "expert_gate_up", "hidden")}),
        Form(ExpertOf(), {prefix + "down_proj": ("experts", "hidden", "expert_ffn")}),
    )


def balancing_coefficient(router_aux_loss_coef: float, model: ModelConfig) -> float:
    """``moe_aux_loss_coeff`` of a ``router_aux_loss_coef``.

    Transformers' balancing loss is taken over all layers at once and counts each of a token's top_k visits; the
    engine's is a sum over layers of a loss that divides by top_k. Hence the factor top_k / number of layers with
    experts: exact for one layer, and for several where they route alike.
    """
    return router_aux_loss_coef * model.moe_top_k / max(len(mixture_layers(model)), 1)


def from_balancing_coefficient(model: ModelConfig) -> float:
    """The way back."""
    return model.moe_aux_loss_coeff * len(mixture_layers(model)) / model.moe_top_k


def refuse_normalized_top_1(model: ModelConfig) -> None:
    """Transformers gives a single expert the weight 1; here its weight is the router's probability.

    Raises:
        CheckpointError: the model has one visited expert with a normalised weight.
    """
    if model.moe_top_k == 1 and model.moe_normalize_top_k:
        raise CheckpointError("num_experts_per_tok is 1 with a normalised weight, which is always 1; not supported")
