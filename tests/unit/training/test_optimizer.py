"""Learning rates, main weights and weight decay."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_grit.config.schema import RunConfig
from megatron_grit.models.decoder import build_model
from megatron_grit.parallel.context import ParallelContext
from megatron_grit.training.optimizer import (
    build_optimizer,
    build_schedule,
    num_warmup_steps,
    set_learning_rate,
    wrap_model,
)
from megatron_grit.training.step import TrainStep
from tests.rows import VOCAB, make_batch, tiny_config


def rates(config: RunConfig, context: ParallelContext, steps: list[int]) -> list[float]:
    optimizer = build_optimizer(config, wrap_model(build_model(config, VOCAB, context)))
    schedule = build_schedule(config, optimizer)
    return [set_learning_rate(schedule, step) for step in steps]


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant"])
def test_schedules(context: ParallelContext, kind: str) -> None:
    config = tiny_config(num_layers=1)
    config.optimizer.lr, config.optimizer.min_lr = 1.0, 0.1
    config.optimizer.schedule, config.optimizer.warmup_steps = kind, 10  # type: ignore[assignment]
    config.training.steps = 110
    decayed = {"linear": 0.55, "cosine": 0.1 + 0.9 * 0.5, "constant": 1.0}[kind]
    quarter = {"linear": 0.775, "cosine": 0.1 + 0.9 * (math.cos(math.pi / 4) + 1) / 2, "constant": 1.0}[kind]
    # Asked for in any order: the rate is a function of the step.
    assert rates(config, context, [60, 0, 5, 10, 35, 60]) == pytest.approx([decayed, 0.0, 0.5, 1.0, quarter, decayed])


@pytest.mark.parametrize(("ratio", "steps", "expected"), [(0.03, 1253, 38), (0.0, 10, 0), (1.0, 10, 9), (0.5, 0, 0)])
def test_warmup(ratio: float, steps: int, expected: int) -> None:
    """38 steps of 1253, as GritLM's recipe has it."""
    config = tiny_config()
    config.optimizer.warmup_ratio, config.training.steps = ratio, steps
    assert num_warmup_steps(config) == expected


def test_bf16_keeps_fp32_main_weights(context: ParallelContext) -> None:
    """Updates of 1e-6 are far below bf16's step at 0.05 (2e-4): each alone is lost in bf16, not in the main weights."""
    config = tiny_config(num_layers=1)
    config.training.precision = "bf16"
    config.optimizer.lr, config.optimizer.schedule = 1e-6, "constant"
    model = build_model(config, VOCAB, context)
    weight = model.decoder.layers[0].self_attention.linear_proj.weight
    assert weight.dtype is torch.bfloat16
    before = weight.detach().clone()
    wrapped = wrap_model(model)
    optimizer = build_optimizer(config, wrapped)
    schedule = build_schedule(config, optimizer)
    step = TrainStep(config, context, wrapped, optimizer)
    main = [p for group in optimizer.chained_optimizers[0].optimizer.param_groups for p in group["params"]]
    assert {p.dtype for p in main} == {torch.float32}
    start = [p.detach().clone() for p in main]
    for number in range(3):
        set_learning_rate(schedule, number)
        step(make_batch())
    moved = max(float((p - old).abs().max()) for p, old in zip(main, start, strict=True))
    assert 2e-6 < moved < 4e-6
    assert (weight == before).float().mean() > 0.9
    assert {p.main_grad.dtype for p in wrapped.parameters()} == {torch.float32}


def test_biases_and_norms_have_no_weight_decay(context: ParallelContext) -> None:
    config = tiny_config(num_layers=1, add_bias_linear=True)
    config.optimizer.weight_decay = 0.1
    model = build_model(config, VOCAB, context)
    optimizer = build_optimizer(config, wrap_model(model))
    decayed = {group["wd_mult"] for group in optimizer.param_groups}
    assert decayed == {0.0, 1.0}
    sizes = {0.0: 0, 1.0: 0}
    for group in optimizer.param_groups:
        sizes[group["wd_mult"]] += sum(p.numel() for p in group["params"])
    assert sizes[0.0] == sum(p.numel() for p in model.parameters() if p.dim() == 1)


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recompute_changes_no_gradient(context: ParallelContext, recompute: str) -> None:
    gradients = []
    for kind in ("none", recompute):
        config = tiny_config(experts=4)
        config.training.recompute = kind  # type: ignore[assignment]
        config.model.hidden_dropout = 0.1
        torch.manual_seed(0)
        wrapped = wrap_model(build_model(config, VOCAB, context))
        for parameter in wrapped.parameters():
            torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(parameter.numel()))
        torch.manual_seed(5)
        wrapped.train()
        TrainStep(config, context, wrapped, None).accumulate_gradients(make_batch())
        gradients.append({name: p.main_grad.clone() for name, p in wrapped.named_parameters()})
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-5, atol=1e-7, msg=name)
