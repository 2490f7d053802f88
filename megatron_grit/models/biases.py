"""Biases of linear layers: which layers have one, and its gradient beside a frozen weight."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from torch import Tensor

from megatron_grit.config.schema import ModelConfig
from megatron_grit.config.shape import has_attention_output_bias, has_mlp_bias, has_qkv_bias


class TrainedBiasLinear(ColumnParallelLinear):  # type: ignore[misc]
    """The engine's column parallel layer, whose bias has a gradient whether its weight is trained or frozen.

    With a frozen weight the engine computes product and bias in one operation that has a gradient for its input only
    (LinearWithFrozenWeight, layers.py:347 of 0.16.1). Here the bias is then added outside of it.
    """

    def _forward_impl(
        self, input: Tensor, weight: Tensor, *args: Any, bias: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        if bias is None or weight.requires_grad:
            output: Tensor = super()._forward_impl(input, weight, *args, bias=bias, **kwargs)
            return output
        return super()._forward_impl(input, weight, *args, bias=None, **kwargs) + bias


def drop_biases(decoder: torch.nn.Module, model: ModelConfig) -> None:
    """Remove the biases that the configuration does not ask for. The engine gives all linear layers one or none, except
    that of queries, keys and values."""
    wanted = {
        "linear_qkv": has_qkv_bias(model),
        "linear_q": has_qkv_bias(model),
        "linear_kv": has_qkv_bias(model),
        "linear_proj": has_attention_output_bias(model),
        "linear_fc1": has_mlp_bias(model),
        "linear_fc2": has_mlp_bias(model),
        "router": False,  # no family has one
    }
    for name, module in decoder.named_modules():
        if not wanted.get(name.rpartition(".")[2], True):
            module.bias = None  # registered or not
