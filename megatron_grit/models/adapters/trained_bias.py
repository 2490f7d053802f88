"""A trained bias beside a frozen weight. The engine gives it no gradient, without a word."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from torch import Tensor


class TrainedBiasLinear(ColumnParallelLinear):  # type: ignore[misc]
    """The engine's column parallel layer, whose bias has a gradient whether its weight has one or not.

    With a frozen weight the engine computes product and bias in one operation that has a gradient for its input only
    (LinearWithFrozenWeight, layers.py:347 of 0.16.1). Here the bias is added outside of it.
    """

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        bias = kwargs.pop("bias")
        output: Tensor = super()._forward_impl(input, weight, *args, bias=None, **kwargs)
        return output if bias is None else output + bias


def train_biases(model: torch.nn.Module) -> None:
    """Make layers of a model with a frozen weight and a trained bias train it. To be called when both are known."""
    for linear in model.modules():
        if type(linear) is not ColumnParallelLinear or linear.bias is None or not linear.bias.requires_grad:
            continue
        if linear.weight is None or not linear.weight.requires_grad:
            linear.__class__ = TrainedBiasLinear
