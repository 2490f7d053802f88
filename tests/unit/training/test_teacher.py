"""A teacher beside one step: which gradients it gives, where it gives none, and what it leaves as it was."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_grit.config.schema import AdapterConfig, RunConfig
from megatron_grit.config.schema.teacher import TeacherConfig
from megatron_grit.data.indexed.roles import RowKind
from megatron_grit.data.rows.batch import StepBatch
from megatron_grit.models.adapters import adapted_linears
from megatron_grit.models.decoder import GritDecoder, build_model
from megatron_grit.parallel.context import ParallelContext
from megatron_grit.training.optimizer import wrap_model
from megatron_grit.training.step import TrainStep
from megatron_grit.training.teacher.model import TeacherModel
from tests.rows import VOCAB, grit_batch, make_row, tiny_config

Gradients = dict[str, Tensor]


def model_of(config: RunConfig, context: ParallelContext, seed: int) -> GritDecoder:
    model = build_model(config, VOCAB, context)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".adapter." not in name:
            # Sure of what it says, or nothing diverges.
            torch.nn.init.normal_(parameter, std=1.0 if "output_layer" in name else 0.1, generator=generator)
    return model


def batch_of(lengths: list[list[int]]) -> StepBatch:
    """Rows of segments; a segment has the same tokens in whatever row it is."""
    rows = []
    for sizes in lengths:
        row = make_row(RowKind.GENERATIVE, sizes, 8 * -(-sum(sizes) // 8))
        begin = 0
        for size in sizes:
            generator = torch.Generator().manual_seed(size)
            row.tokens_1T[0, begin : begin + size] = torch.randint(0, VOCAB, (size,), generator=generator)
            begin += size
        row.labels_1T = row.tokens_1T.roll(-1, 1)
        rows.append(row)
    return grit_batch([], rows, 0)


BATCH = [[9, 5, 20], [13, 7]]


def step(
    context: ParallelContext,
    knobs: TeacherConfig,
    lengths: list[list[int]] = BATCH,
    model: GritDecoder | None = None,
    teacher: GritDecoder | None = None,
    **settings: Any,
) -> tuple[dict[str, float], Gradients]:
    """Metrics and gradients. ``teacher`` None: the model itself, its adapters off."""
    config = tiny_config(num_layers=2, hidden_size=32, **settings)
    config.training.objective, config.loss.teacher = "generative", knobs  # type: ignore[assignment]
    torch.manual_seed(3)  # dropout
    model = model_of(config, context, 1) if model is None else model
    teaches = TeacherModel(knobs, context, [model if teacher is None else teacher]) if knobs.kind != "none" else None
    wrapped = wrap_model(model)
    wrapped.train()
    taught = TrainStep(config, context, wrapped, None, teaches)
    metrics = taught.accumulate_gradients(batch_of(lengths))
    assert not any(row.teacher for row, _, _ in taught.outcomes.entries), "states of the teacher outlive the step"
    assert all(module.training for module in model.modules())
    return metrics, {name: p.main_grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def other(context: ParallelContext, hidden_size: int = 64) -> GritDecoder:
    """A teacher of another width, with dropout of its own."""
    config = tiny_config(num_layers=2, hidden_size=hidden_size, hidden_dropout=0.3)
    return model_of(config, context, 7).requires_grad_(False)


def cosine(one: Gradients, two: Gradients) -> float:
    flat = [torch.cat([each[name].flatten().double() for name in one]) for each in (one, two)]
    return float(torch.nn.functional.cosine_similarity(*flat, 0))


def test_the_published_form_scales_the_labels_gradient_and_a_divergence_does_not(context: ParallelContext) -> None:
    """T7 of the Instruction Modelling baseline: (1 - weight) x the gradient of the next-token loss, at any weight."""
    plain_metrics, plain = step(context, TeacherConfig())
    teacher = other(context)
    for weight in (0.1, 1.0, 3.0):
        metrics, gold = step(context, TeacherConfig(kind="gold", weight=weight), teacher=teacher)
        for name, gradient in plain.items():
            torch.testing.assert_close(gold[name], (1 - weight) * gradient, rtol=1e-4, atol=1e-6, msg=name)
        assert metrics["loss_gen"] == pytest.approx(plain_metrics["loss_gen"], abs=1e-6)
        assert metrics["loss"] == pytest.approx(metrics["loss_gen"] + weight * metrics["loss_teacher"], abs=1e-5)
    for direction in ("forward", "reverse"):
        knobs = TeacherConfig(kind="full", direction=direction, label_weight=0.0)  # type: ignore[arg-type]
        metrics, full = step(context, knobs, teacher=teacher)
        assert metrics["loss_teacher"] > 0.1 and metrics["loss"] == pytest.approx(metrics["loss_teacher"])
        assert abs(cosine(full, plain)) < 0.9


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_fresh_adapters_do_not_diverge_from_their_base(context: ParallelContext, kind: str, direction: str) -> None:
    """No loss and no gradient, exactly, until an adapter has moved; then the base is what it was."""
    config = tiny_config(num_layers=2, hidden_size=32)
    config.adapter = AdapterConfig(kind=kind, rank=4)  # type: ignore[arg-type]
    config.training.objective = "generative"  # type: ignore[assignment]
    model = model_of(config, context, 1)
    for linear in adapted_linears(model).values():
        linear.adapter.reset_magnitudes(linear)
    knobs = TeacherConfig(kind="full", direction=direction, label_weight=0.0)  # type: ignore[arg-type]
    metrics, gradients = step(context, knobs, model=model)
    # DoRA multiplies by magnitude / length, which is 1 but for the last bit.
    allowed = 0 if kind == "lora" else 1e-6
    assert abs(metrics["loss_teacher"]) <= allowed
    assert gradients and max(float(gradient.abs().max()) for gradient in gradients.values()) <= allowed
    base = [row_logits(model, context)]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(4))
    base.append(row_logits(model, context))
    assert not torch.equal(*base), "adapters count where the model is not the teacher"
    metrics, gradients = step(context, knobs, model=model)
    assert metrics["loss_teacher"] > 100 * allowed and any(gradient.any() for gradient in gradients.values())


def row_logits(model: GritDecoder, context: ParallelContext) -> Tensor:
    from megatron_grit.models.decoder import Output

    (row, _) = batch_of(BATCH).rows
    with torch.no_grad():
        return model(row.to(context.device), Output.LOGITS)


def test_a_teacher_with_the_same_weights_is_no_teacher(context: ParallelContext) -> None:
    """Another model with the weights of the trained one, which is in training with dropout off."""
    same = model_of(tiny_config(num_layers=2, hidden_size=32), context, 1).requires_grad_(False)
    metrics, gradients = step(context, TeacherConfig(kind="full", label_weight=0.0, temperature=2.0), teacher=same)
    assert metrics["loss_teacher"] == 0 and not any(gradient.any() for gradient in gradients.values())


def test_segments_of_a_row_are_taught_as_if_alone(context: ParallelContext) -> None:
    knobs, teacher = TeacherConfig(kind="full", temperature=1.5), other(context)
    packed, together = step(context, knobs, [[9, 5, 20]], teacher=teacher)
    alone, apart = step(context, knobs, [[9], [5], [20]], teacher=teacher)
    assert packed["loss_teacher"] == pytest.approx(alone["loss_teacher"], abs=1e-6)
    for name, gradient in together.items():
        torch.testing.assert_close(apart[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_a_teacher_draws_nothing(context: ParallelContext) -> None:
    """With weight 0 a step with dropout is, bit for bit, the one without; the teacher has no dropout itself."""
    dropout = {"hidden_dropout": 0.2}
    _, plain = step(context, TeacherConfig(), **dropout)
    knobs = TeacherConfig(kind="full", weight=0.0)
    teacher = other(context)
    runs = [step(context, knobs, teacher=teacher, **dropout) for _ in range(2)]
    for name, gradient in runs[0][1].items():
        torch.testing.assert_close(gradient, plain[name], rtol=0, atol=0, msg=name)
    assert runs[0][0] == runs[1][0]
    assert not torch.equal(plain["output_layer.weight"], step(context, TeacherConfig())[1]["output_layer.weight"])


def test_weights_of_labels_weigh_the_teacher_too(context: ParallelContext) -> None:
    """A token of weight 0 is not taught; halves count half, divided by the same sum."""
    knobs, teacher = TeacherConfig(kind="full", label_weight=0.0), other(context)
    batch = batch_of([[16]])
    (row,) = batch.rows
    assert row.loss_mask_1T is not None
    row.loss_mask_1T[0] *= torch.linspace(0, 1, 16).round(decimals=1)
    weights = row.loss_mask_1T[0].double()
    config = tiny_config(num_layers=2, hidden_size=32)
    config.training.objective, config.loss.teacher = "generative", knobs  # type: ignore[assignment]
    model = model_of(config, context, 1)
    taught = TrainStep(config, context, wrap_model(model), None, TeacherModel(knobs, context, [teacher]))
    counted = grit_batch([], [replace(row)], 0)
    found = taught.accumulate_gradients(counted)["loss_teacher"]
    from megatron_grit.models.decoder import Output

    with torch.no_grad():
        q, p = (each.eval()(row.to(context.device), Output.LOGITS).double().log_softmax(1) for each in (model, teacher))
    expected = ((p.exp() * (p - q)).sum(1) * weights).sum() / weights.sum()
    assert found == pytest.approx(float(expected), rel=1e-5)
