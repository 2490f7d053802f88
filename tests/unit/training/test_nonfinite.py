"""Steps whose losses or gradients are not finite: nothing is updated, and the fault is named."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_grit.config.schema import RunConfig
from megatron_grit.data.rows.batch import StepBatch
from megatron_grit.errors import NumericsError
from megatron_grit.models.decoder import build_model
from megatron_grit.parallel.context import ParallelContext
from megatron_grit.training.nonfinite import NonFiniteGuard, explain
from megatron_grit.training.optimizer import build_optimizer, wrap_model
from megatron_grit.training.step import TrainStep
from tests.rows import VOCAB, make_batch, tiny_config

RUINED = 3  # a token


class _NanInGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor) -> torch.Tensor:
        return values.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return gradients[0] * math.nan


def batch_with(kind: str | None = None, row: int = 0, segment: int = 0) -> StepBatch:
    """A batch in which one record begins with the token that :func:`spoil` looks for. No kind: none does."""
    batch = make_batch()
    for every in batch.rows:
        every.tokens_1T[every.tokens_1T == RUINED] = RUINED + 1
    if kind is not None:
        rows = batch.rows_of("embedding") if kind == "embedding" else batch.rows_of("generative")
        rows[row].tokens_1T[0, int(rows[row].cu_seqlens[segment])] = RUINED
    return batch


def spoil(model: torch.nn.Module, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Change the states of the ruined token after the embedding layer."""

    def after(_: torch.nn.Module, args: Any, kwargs: Any, output: torch.Tensor) -> torch.Tensor:
        is_ruined = kwargs["input_ids"][0] == RUINED
        return output.index_put((is_ruined,), change(output[is_ruined]))

    model.embedding.register_forward_hook(after, with_kwargs=True)  # type: ignore[operator, union-attr]


class Run:
    """A model, its optimizer and step, and what training changes."""

    def __init__(self, config: RunConfig, context: ParallelContext) -> None:
        self.model = build_model(config, VOCAB, context)
        generator = torch.Generator().manual_seed(2)
        for parameter in self.model.parameters():
            torch.nn.init.normal_(parameter, std=0.05, generator=generator)
        self.wrapped = wrap_model(self.model)
        self.optimizer = build_optimizer(config, self.wrapped)
        self.step = TrainStep(config, context, self.wrapped, self.optimizer)

    def state(self) -> dict[str, torch.Tensor]:
        """Weights and everything that Adam holds."""
        state = {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}
        for number, values in enumerate(self.optimizer.chained_optimizers[0].optimizer.state.values()):
            state |= {f"{number}.{name}": torch.as_tensor(value).clone() for name, value in values.items()}
        return state


def config_in(directory: Path, **training: Any) -> RunConfig:
    config = tiny_config()
    config.output_dir = str(directory)
    for name, value in training.items():
        setattr(config.training, name, value)
    return config


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("kind", ["embedding", "generative"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_stops_the_run_and_names_the_record(
    kind: str, bad: float, context: ParallelContext, tmp_path: Path
) -> None:
    run = Run(config_in(tmp_path), context)
    run.step(batch_with())  # so that Adam has states
    spoil(run.model, lambda states: states * bad)
    before, batch = run.state(), batch_with(kind, 2, 1)
    loss, record = ("loss_emb", "row2#1") if kind == "embedding" else ("loss_gen", "row102#1")
    with pytest.raises(NumericsError) as error:
        run.step(batch)
    assert f"step 1: {loss} is nan" in str(error.value)
    assert f"{loss} of row 2 on rank 0 (tensor 0, pipeline 0, data 0): {record};" in str(error.value)
    assert_equal(run.state(), before)
    assert not (tmp_path / "skipped.jsonl").exists()


def test_a_gradient_stops_the_run_and_names_the_parameters(context: ParallelContext, tmp_path: Path) -> None:
    """The losses are finite: only what lies below the fault in the graph is named."""
    run = Run(config_in(tmp_path), context)
    run.step(batch_with())
    spoil(run.model, _NanInGradient.apply)
    before, batch = run.state(), batch_with("generative", 1, 0)
    with pytest.raises(NumericsError) as error:
        run.step(batch)
    assert (
        "step 1: grad_norm is nan, the losses are finite; gradients of embedding.word_embeddings.weight on rank 0 "
        in (str(error.value))
    )
    assert "decoder" not in str(error.value) and "row0#0, " in str(error.value)
    assert_equal(run.state(), before)


def test_skipped_steps_are_counted_and_listed_and_the_next_is_as_if_they_had_not_been(
    context: ParallelContext, tmp_path: Path
) -> None:
    plain, run = (Run(config_in(tmp_path / name, on_nan="skip"), context) for name in ("plain", "skipping"))
    spoil(run.model, lambda states: states * math.nan)
    bad = batch_with("embedding", 1, 2)
    assert run.step(batch_with())["skipped_steps"] == 0
    plain.step(batch_with())
    metrics = run.step(bad)
    assert metrics["skipped_steps"] == 1 and math.isnan(metrics["loss_emb"]) and math.isfinite(metrics["loss_gen"])
    assert run.step(batch_with()) == plain.step(batch_with()) | {"skipped_steps": 1}
    assert_equal(run.state(), plain.state())
    (line,) = (tmp_path / "skipping" / "skipped.jsonl").read_text().splitlines()
    entry = json.loads(line)
    assert entry["step"] == 1
    (row,) = entry["rows"]
    assert row["not_finite"] == ["row1#2"] and row["records"] == ["row1#0", "row1#1", "row1#2"] and row["row"] == 1
    assert not (tmp_path / "plain" / "skipped.jsonl").exists()


def test_too_many_in_a_row_end_the_run(context: ParallelContext, tmp_path: Path) -> None:
    """A good step between them starts the count anew."""
    run = Run(config_in(tmp_path, on_nan="skip", max_skipped_steps=3), context)
    spoil(run.model, lambda states: states * math.nan)
    bad = batch_with("generative", 0, 0)
    for batch in (bad, bad, batch_with(), bad, bad):
        metrics = run.step(batch)
    assert metrics["skipped_steps"] == 4
    with pytest.raises(NumericsError, match=r"3 steps in a row were not finite, and training.max_skipped_steps is 3"):
        run.step(bad)


def test_a_resumed_run_goes_on_counting(context: ParallelContext, tmp_path: Path) -> None:
    """Resumed after step 5; steps 2, 4 and 5 had been skipped, and 6 and 7 after the checkpoint."""
    lines = [json.dumps({"step": step, "reason": ""}) + "\n" for step in (2, 4, 5, 6, 7)]
    (tmp_path / "skipped.jsonl").write_text("".join(lines) + '{"step": 8, "re')
    guard = NonFiniteGuard(config_in(tmp_path, on_nan="skip", max_skipped_steps=3), context)
    guard.resume(5)
    assert guard.num_skipped == 3
    assert [json.loads(line)["step"] for line in (tmp_path / "skipped.jsonl").read_text().splitlines()] == [2, 4, 5]
    run = Run(guard.config, context)
    run.step.guard = guard
    spoil(run.model, lambda states: states * math.nan)
    bad = batch_with("embedding", 0, 0)
    with pytest.raises(NumericsError, match="3 steps in a row"):
        run.step(bad)
    guard.resume(0)
    assert guard.num_skipped == 0 and (tmp_path / "skipped.jsonl").read_text() == ""


def report(rank: int, **given: Any) -> dict[str, Any]:
    empty: dict[str, Any] = {"not_finite": {"grad_norm": "nan"}, "rows": [], "own": [], "reduced": [], "records": ["r"]}
    return {"rank": rank, "place": f"rank {rank}", "data": rank} | empty | given


def test_the_rank_at_fault_is_told_from_those_that_its_gradient_was_reduced_with() -> None:
    reason, record = explain([report(0, reduced=["a", "b"]), report(1, own=["a", "b", "c"]), report(2)])
    assert "gradients of a, b, c on rank 1, records r" in reason and "on rank 0" not in reason
    assert [entry["rank"] for entry in record["gradients"]] == ["rank 1"]
    # Its fault lies in the part that it owns itself, so it is finite everywhere else.
    reason, _ = explain([report(0), report(1, reduced=["a"])])
    assert "gradients of a on rank 1" in reason


def test_finite_gradients_whose_norm_is_not() -> None:
    reason, record = explain([report(0), report(1)])
    assert reason == "grad_norm is nan; losses and gradients are finite, the sum of squares is not"
    assert record == {"reason": "grad_norm is nan", "gradients": []}


def test_ranks_that_share_a_row_are_one_fault() -> None:
    """Tensor parallel ranks know the same, context parallel ranks of their own tokens each."""
    rows = [
        {"loss": "loss_gen", "row": 0, "records": ["a", "b", "c"], "not_finite": bad} for bad in (["c"], ["a"], ["c"])
    ]
    losses = {"loss": "nan", "loss_gen": "nan"}
    reports = [report(rank, rows=[row], data=0, not_finite=losses) for rank, row in enumerate(rows)]
    reason, record = explain(reports)
    assert reason == "loss_gen is nan; loss_gen of row 0 on rank 0: a, c"
    assert len(record["rows"]) == 1


def test_finite_rows_with_a_loss_that_is_not() -> None:
    reason, _ = explain([report(0, not_finite={"loss_emb": "inf"})])
    assert reason == "loss_emb is inf; the model's output is finite for every row, so it is the loss that overflows"
