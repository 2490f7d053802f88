"""Which linear layers have a bias. The engine gives all of them one or none, but for queries, keys and values."""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes

from megatron_grit.config.schema import ModelConfig
from megatron_grit.config.shape import has_attention_output_bias, has_mlp_bias, has_qkv_bias


def drop_biases(decoder: torch.nn.Module, model: ModelConfig) -> None:
    """Take away the biases that the configuration does not ask for."""
    wanted = {
        "linear_qkv": has_qkv_bias(model),
        "linear_proj": has_attention_output_bias(model),
        "linear_fc1": has_mlp_bias(model),
        "linear_fc2": has_mlp_bias(model),
    }
    for name, module in decoder.named_modules():
        if not wanted.get(name.rpartition(".")[2], True):
            module.register_parameter("bias", None)


def add_output_bias(output_layer: torch.nn.Module, num_rows: int, dtype: torch.dtype) -> None:
    """Give the output layer a bias, sharded as its rows are.

    Args:
        output_layer: the engine's, built without one.
        num_rows: of the vocabulary on this rank.
        dtype: of the weights.
    """
    bias = torch.nn.Parameter(torch.zeros(num_rows, dtype=dtype))
    set_tensor_model_parallel_attributes(bias, is_parallel=True, dim=0, stride=1)
    output_layer.register_parameter("bias", bias)
