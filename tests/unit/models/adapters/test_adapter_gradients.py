"""Gradients beside frozen weights: where the engine has none, and where nothing requires one."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear

from megatron_grit.config.schema import RunConfig
from megatron_grit.models.biases import TrainedBiasLinear
from megatron_grit.models.decoder import GritDecoder, build_model
from megatron_grit.parallel.context import ParallelContext
from megatron_grit.parallel.random import RandomState, replay
from megatron_grit.training.optimizer import build_optimizer, build_schedule, set_learning_rate, wrap_model
from megatron_grit.training.restore_checks import optimizer_parts
from megatron_grit.training.step import TrainStep
from tests.rows import VOCAB, make_batch, tiny_config


def gradients(config: RunConfig, context: ParallelContext, **options: Any) -> dict[str, torch.Tensor]:
    """Of a step, by name; of what is trained. All calls draw the same weights and masks."""
    with replay(RandomState.capture()):
        return _gradients(build_model(config, VOCAB, context), config, context, options)


def _gradients(
    model: GritDecoder, config: RunConfig, context: ParallelContext, options: dict[str, Any]
) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                generator = torch.Generator().manual_seed(len(name))
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    wrapped = wrap_model(model)
    wrapped.train()
    step = TrainStep(config, context, wrapped, None)
    step.accumulate_gradients(make_batch(**options))
    return {name: p.main_grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def bitfit(**model: Any) -> RunConfig:
    shape = {"add_bias_linear": True, "normalization": "layernorm", "add_output_bias": True}
    config = tiny_config(**(shape | model))
    config.training.trainable = ["biases"]
    return config


@pytest.mark.parametrize("objective", ["unified", "embedding"])
def test_biases_alone_have_the_gradient_that_they_have_among_all(context: ParallelContext, objective: str) -> None:
    alone = bitfit()
    alone.training.objective = objective  # type: ignore[assignment]
    among = bitfit()
    among.training = RunConfig().training
    among.training.precision, among.training.objective = "fp32", alone.training.objective
    ours, theirs = (gradients(config, context, objective=objective) for config in (alone, among))
    assert ours.keys() == {name for name in theirs if name.endswith(".bias")}
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], atol=1e-6, rtol=1e-4)
        assert gradient.any() or objective == "embedding" and name == "output_layer.bias", name


def test_without_our_layer_a_bias_has_no_gradient(context: ParallelContext) -> None:
    """The engine's own layer gives it none; if that changes, TrainedBiasLinear can go."""
    with mock.patch.object(TrainedBiasLinear, "_forward_impl", ColumnParallelLinear._forward_impl):
        found = gradients(bitfit(), context)
    assert not found["decoder.layers.0.self_attention.linear_qkv.bias"].any()
    assert found["decoder.layers.0.mlp.linear_fc1.bias"].any()


@pytest.mark.parametrize("kind", ["lora", "dora", "last layer", "embedding head", "head"])
def test_recomputed_layers_train_what_plain_ones_train(context: ParallelContext, kind: str) -> None:
    config = tiny_config()
    if kind in ("lora", "dora"):
        config.adapter.kind, config.adapter.rank, config.adapter.dropout = kind, 4, 0.2  # type: ignore[assignment]
    elif kind == "last layer":
        config.training.trainable = ["decoder.layers.3.*"]
    elif kind == "head":  # no gradient comes out of an embedding row
        config.training.trainable = ["head"]
    else:
        config.embedding.projection_dim, config.training.trainable = 8, ["embedding_head.*"]
    expected = gradients(config, context)
    config.training.recompute = "full"
    found = gradients(config, context)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-5)
        assert gradient.any(), name


def test_frozen_weights_take_no_memory_but_their_own(context: ParallelContext) -> None:
    config = tiny_config(experts=2)
    config.adapter.kind, config.adapter.rank = "lora", 2
    model: GritDecoder = build_model(config, VOCAB, context)
    wrapped = wrap_model(model)
    optimizer = build_optimizer(config, wrapped)
    set_learning_rate(build_schedule(config, optimizer), 0)
    TrainStep(config, context, wrapped, optimizer)(make_batch())
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    frozen = [p for p in model.parameters() if not p.requires_grad]
    assert not any(hasattr(p, "main_grad") or p.grad is not None for p in frozen)
    buffers = sum(buffer.grad_data.numel() for buffer in wrapped.buffers + wrapped.expert_parallel_buffers)
    # The engine pads a buffer to a multiple of its own.
    assert sum(trained.values()) <= buffers < sum(trained.values()) + 1024 < sum(p.numel() for p in frozen) / 4
    moments = [
        state["exp_avg"].numel() for part in optimizer_parts(optimizer) for state in part.optimizer.state.values()
    ]
    assert sum(moments) == sum(trained.values())


def test_a_frozen_router_still_balances_through_the_adapters(context: ParallelContext) -> None:
    """The balancing loss has no weight of its own to move: its gradient goes on to the layers below."""
    config = tiny_config(experts=2)
    config.adapter.kind, config.adapter.rank = "lora", 2
    with_loss = gradients(config, context)
    config.model.moe_aux_loss_coeff = 0.0
    without = gradients(config, context)
    name = "decoder.layers.0.self_attention.linear_qkv.adapter.q_proj.lora_A"
    assert not torch.equal(with_loss[name], without[name])
