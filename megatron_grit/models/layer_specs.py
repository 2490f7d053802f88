"""The engine's TransformerConfig of a run, and the layer specification with our parts in it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_grit import compat
from megatron_grit.config.schema import RunConfig
from megatron_grit.models.attention import PackedAttention, select_backend
from megatron_grit.models.norms import norm_class
from megatron_grit.models.router import PackedRouter

_RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective"},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}


def transformer_config(config: RunConfig) -> TransformerConfig:
    """The engine's configuration of a run.

    Losses are divided by counts of the global batch before the engine sees them, and gradients averaged over data
    parallel ranks as the engine does by default; ``calculate_per_token_loss`` stays off because with sequence
    parallelism it weighs the expert balancing loss by 1 / tensor parallel size (router.py:456 takes a rank's share
    of the tokens for all of them).
    """
    model, parallel = config.model, config.parallel
    dtype = torch.bfloat16 if config.training.precision == "bf16" else torch.float32
    moe: dict[str, Any] = {}
    if model.num_experts is not None:
        moe = {
            "num_moe_experts": model.num_experts,
            "moe_router_topk": model.moe_top_k,
            "moe_ffn_hidden_size": model.ffn_hidden_size,
            "moe_token_dispatcher_type": "alltoall",
            "moe_router_load_balancing_type": "aux_loss",
            "moe_aux_loss_coeff": model.moe_aux_loss_coeff,
            "moe_z_loss_coeff": model.moe_z_loss_coeff or None,
            # Mixtral normalises the chosen experts' weights to 1: softmax over the chosen ones. The weight of one alone
            # would always be 1, and the router would learn nothing: then it is its share among all (Switch).
            "moe_router_pre_softmax": model.moe_top_k == 1,
        }
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups or model.num_attention_heads,
        kv_channels=model.kv_channels or model.hidden_size // model.num_attention_heads,
        normalization="RMSNorm" if model.normalization == "rmsnorm" else "LayerNorm",
        layernorm_epsilon=model.norm_epsilon,
        gated_linear_unit=model.activation == "swiglu",
        activation_func=F.silu if model.activation == "swiglu" else F.gelu,
        add_bias_linear=model.add_bias_linear,
        add_qkv_bias=model.add_qkv_bias,
        hidden_dropout=model.hidden_dropout,
        attention_dropout=model.attention_dropout,
        init_method_std=model.init_std,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline,
        # Batched exchanges between the two stages of an interleaved pipeline mix up their tensors on gloo, silently.
        overlap_p2p_comm=parallel.virtual_pipeline is not None,
        batch_p2p_comm=parallel.virtual_pipeline is None,
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor,
        sequence_parallel=parallel.sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        attention_softmax_in_fp32=True,
        # Fused kernels of apex and TransformerEngine; plain torch gives the same numbers everywhere.
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        **_RECOMPUTE[config.training.recompute],
        **moe,
    )


def block_spec(
    config: RunConfig, engine_config: TransformerConfig, device: torch.device, virtual_stage: int | None = None
) -> TransformerBlockSubmodules:
    """Layers of this pipeline stage, or of one chunk of it: the engine's local specification with our norms and core
    attention."""
    if config.model.num_experts is not None:
        compat.let_routers_run_without_transformer_engine()
    layer = get_gpt_layer_local_spec(
        num_experts=config.model.num_experts,
        moe_grouped_gemm=False,
        normalization=engine_config.normalization,
    )
    if config.model.num_experts is not None:
        compat.set_router(layer.submodules.mlp, PackedRouter)
    norm = norm_class(config.model.normalization)
    layer.submodules.input_layernorm = norm
    layer.submodules.pre_mlp_layernorm = norm
    layer.submodules.self_attention.submodules.core_attention = ModuleSpec(
        module=PackedAttention,
        params={
            "backend": select_backend(config.model.attention_backend, device, engine_config),
            "sliding_window": config.model.sliding_window,
        },
    )
    num_layers = get_num_layers_to_build(engine_config, virtual_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=norm)
