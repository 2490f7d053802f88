"""The engine's TransformerConfig of a run, and the specification of its layers."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)

from megatron_grit import compat
from megatron_grit.config.schema import RunConfig
from megatron_grit.config.schema.retro import RetroConfig
from megatron_grit.config.shape import (
    dense_layers,
    expert_width,
    head_channels,
    num_query_groups,
    reading_layers,
    window_of_layer,
)
from megatron_grit.models.attention import PackedAttention, select_backend
from megatron_grit.models.biases import TrainedBiasLinear
from megatron_grit.models.norms import norm_class
from megatron_grit.models.parallel_residual import ParallelResidualLayer
from megatron_grit.models.retro.layer import EncoderLayer, NeighborEncoder, RetroLayer, carrying, encoder_config
from megatron_grit.models.rope import attention_scale
from megatron_grit.models.router import PackedRouter

_ACTIVATIONS = {"swiglu": F.silu, "gelu": F.gelu, "gelu_tanh": functools.partial(F.gelu, approximate="tanh")}
_RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective"},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}


def transformer_config(config: RunConfig) -> TransformerConfig:
    """The engine's configuration of a run.

    Losses are divided by counts of the global batch before the engine sees them, and the engine averages gradients over
    data parallel ranks. ``calculate_per_token_loss`` stays off: with sequence parallelism it would scale the expert
    balancing loss by 1 / tensor parallel size (router.py:456 counts only a rank's shard of the tokens).
    """
    model, parallel = config.model, config.parallel
    dtype = torch.bfloat16 if config.training.precision == "bf16" else torch.float32
    moe: dict[str, Any] = {}
    if model.num_experts is not None:
        moe = {
            "num_moe_experts": model.num_experts,
            "moe_router_topk": model.moe_top_k,
            "moe_ffn_hidden_size": expert_width(model),
            "moe_shared_expert_intermediate_size": model.moe_shared_ffn_hidden_size,
            "moe_shared_expert_gate": model.moe_shared_expert_gate,
            "moe_router_load_balancing_type": "aux_loss",
            "moe_aux_loss_coeff": model.moe_aux_loss_coeff,
            "moe_z_loss_coeff": model.moe_z_loss_coeff or None,
            # A softmax over the chosen experts gives weights that add up to 1, as Mixtral's do. That of one alone would
            # always be 1, and the router would learn nothing: then it is its share among all (Switch).
            "moe_router_pre_softmax": not model.moe_normalize_top_k or model.moe_top_k == 1,
        }
    if model.moe_dense_layers:
        # Set only if needed: it makes the engine number the weights of each layer.
        moe["moe_layer_freq"] = [int(layer not in model.moe_dense_layers) for layer in range(model.num_layers)]
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=num_query_groups(model),
        kv_channels=head_channels(model),
        normalization="RMSNorm" if model.normalization == "rmsnorm" else "LayerNorm",
        layernorm_zero_centered_gamma=model.layernorm_zero_centered_gamma,
        layernorm_epsilon=model.norm_epsilon,
        gated_linear_unit=model.activation == "swiglu",
        activation_func=_ACTIVATIONS[model.activation],
        # The engine's linear layers all have a bias or none; models/biases.py removes those that are not wanted.
        add_bias_linear=model.add_bias_linear or model.add_attention_output_bias or model.add_mlp_bias,
        add_qkv_bias=model.add_qkv_bias,
        qk_layernorm=model.qk_norm,
        softmax_scale=attention_scale(model),
        rotary_interleaved=model.rotary_interleaved,
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
        moe_token_dispatcher_type="alltoall",  # of dense models too: the engine's default goes with rows of one length
        # Neighbors travel behind the row, and rows have more or fewer of them.
        variable_seq_lengths=bool(reading_layers(model)) and parallel.pipeline > 1,
        **_RECOMPUTE[config.training.recompute],
        **moe,
    )


def block_spec(
    config: RunConfig, engine_config: TransformerConfig, device: torch.device, virtual_stage: int | None = None
) -> TransformerBlockSubmodules:
    """Layers of this pipeline stage, or of one chunk of it, and the final norm."""
    num_layers = get_num_layers_to_build(engine_config, virtual_stage)
    first = get_transformer_layer_offset(engine_config, virtual_stage)
    layers = [layer_spec(config, engine_config, device, layer) for layer in range(first, first + num_layers)]
    if reading_layers(config.model) and first + num_layers < config.model.num_layers:
        layers[-1].module = carrying(layers[-1].module)
    final_norm = None if config.model.retro.parity == "core" else norm_class(config.model.normalization)
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=final_norm)


def layer_spec(config: RunConfig, engine_config: TransformerConfig, device: torch.device, layer: int) -> ModuleSpec:
    """Layer number ``layer`` of the whole model, from 0."""
    model = config.model
    params: dict[str, Any] = {}
    module: type = TransformerLayer if model.parallel_residual == "none" else ParallelResidualLayer
    reading = reading_layers(model)
    if layer in reading:
        module, params = RetroLayer, {"model": model}
        if layer == reading[0]:
            params["encoder"] = _encoder(config, engine_config, device)
    norm = norm_class(model.normalization)
    return ModuleSpec(
        module=module,
        params=params,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=self_attention_spec(config, engine_config, device, layer),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=IdentityOp if model.parallel_residual == "one_norm" else norm,
            mlp=feed_forward_spec() if layer in dense_layers(model) else experts_spec(),
            mlp_bda=get_bias_dropout_add,
            # In files a norm belongs to the linear layer after it, as in TransformerEngine's fused layers.
            sharded_state_dict_keys_map={
                "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
                "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
            },
        ),
    )


def _encoder(config: RunConfig, engine_config: TransformerConfig, device: torch.device) -> Any:
    """Makes the encoder of neighbors. Its layers are those of a dense decoder."""
    num_layers = config.model.retro.encoder_layers
    model = replace(config.model, num_layers=num_layers, num_experts=None, window_layers=[], retro=RetroConfig())
    settings = encoder_config(engine_config, config.model)
    specs = []
    for number in range(num_layers):
        spec = layer_spec(replace(config, model=model), settings, device, number)
        if number == 0 and config.model.retro.encoder_conditioning == "chunk":
            spec = ModuleSpec(module=EncoderLayer, params={"model": config.model}, submodules=spec.submodules)
        specs.append(spec)
    return functools.partial(NeighborEncoder, settings, config.model, specs, device)


def self_attention_spec(
    config: RunConfig, engine_config: TransformerConfig, device: torch.device, layer: int
) -> ModuleSpec:
    """Attention of a layer to its own row; arguments as for :func:`layer_spec`."""
    model = config.model
    head_norm = norm_class(model.normalization) if model.qk_norm else IdentityOp
    core_attention = ModuleSpec(
        module=PackedAttention,
        params={
            "backend": select_backend(model.attention_backend, device, engine_config),
            "sliding_window": window_of_layer(model, layer),
        },
    )
    return ModuleSpec(
        module=SelfAttention,
        # The engine requires a mask type; PackedAttention follows the mode of each row instead.
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=TrainedBiasLinear,
            core_attention=core_attention,
            linear_proj=RowParallelLinear,
            q_layernorm=head_norm,
            k_layernorm=head_norm,
        ),
    )


def feed_forward_spec() -> Any:
    """The feed-forward layer of a dense layer."""
    return compat.feed_forward_spec(_linears())


def experts_spec() -> ModuleSpec:
    """The experts of a mixture layer, with a shared one where the configuration has it."""
    compat.let_routers_run_without_transformer_engine()
    experts = MoESubmodules(
        experts=ModuleSpec(module=SequentialMLP, submodules=_linears()),
        shared_experts=ModuleSpec(module=SharedExpertMLP, submodules=_linears()),
        router=PackedRouter,
    )
    return ModuleSpec(module=MoELayer, submodules=experts)


def _linears() -> MLPSubmodules:
    return MLPSubmodules(linear_fc1=TrainedBiasLinear, linear_fc2=RowParallelLinear)
