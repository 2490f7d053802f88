"""A step's loss and gradients do not depend on how its conversations are laid into micro-batches, where labels count
the same; and depend on it just as a mean of means does, where that is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.sft_packing import conversations, relaid
from megatron_grit.config.schema import ParallelConfig
from megatron_grit.data.indexed.roles import RowKind
from megatron_grit.data.rows.batch import PackedRow, StepBatch
from megatron_grit.models.decoder import Output, build_model
from megatron_grit.parallel.launch import parallel_job
from megatron_grit.training.optimizer import build_optimizer, wrap_model
from megatron_grit.training.step import TrainStep
from tests.rows import VOCAB, grit_batch, make_row, tiny_config

LENGTHS = [40, 12, 9, 30, 25, 7, 50, 11]
ANSWERS = [4, 10, 2, 25, 3, 5, 44, 1]
"""Labels at the end of each conversation."""
LAYOUTS: dict[str, tuple[int, int | None] | None] = {
    "packed": None,
    **{f"{group} padded to the longest": (group, None) for group in (1, 2, 4, 8)},
    "1 padded to 64": (1, 64),
}
SIZES = (1, 2, 4, 8)
TOLERANCE = 1e-6


def rows() -> list[PackedRow]:
    """Two rows of four and four conversations, with labels on answers alone."""
    made = []
    for number, some in enumerate((slice(0, 4), slice(4, 8))):
        row = make_row(RowKind.GENERATIVE, LENGTHS[some], 96, seed=number)
        ends = np.cumsum(LENGTHS[some])
        is_answer = torch.zeros_like(row.padding_mask_1T)
        for end, count in zip(ends.tolist(), ANSWERS[some], strict=True):
            is_answer[0, end - 1 - count : end - 1] = True
        assert row.loss_mask_1T is not None
        row.loss_mask_1T = row.loss_mask_1T * is_answer
        made.append(row)
    return made


class Measured:
    """A model, the step's loss and gradients by each reduction, and the same in one graph of plain torch."""

    def __init__(self, context: Any) -> None:
        self.context, self.config = context, tiny_config()
        self.config.training.objective = "generative"
        self.model = build_model(self.config, VOCAB, context)
        self.wrapped = wrap_model(self.model)
        self.optimizer = build_optimizer(self.config, self.wrapped)

    def step(self, batch: StepBatch, kind: str) -> tuple[float, torch.Tensor]:
        """Loss, and all gradients in one vector."""
        self.config.loss.loss_gen_type = kind  # type: ignore[assignment]
        step = TrainStep(self.config, self.context, self.wrapped, self.optimizer)
        self.wrapped.zero_grad_buffer()
        loss = step.accumulate_gradients(batch)["loss"]
        return loss, torch.cat([each.main_grad.flatten() for each in self.model.parameters()]).clone()

    def reference(self, size: int | None) -> tuple[float, torch.Tensor]:
        """Mean over the micro-batches of ``size`` conversations of each one's mean over labels; None: over labels."""
        losses, labels = [], []
        for each in conversations(grit_batch([], rows(), 0).parts["generative"]):
            alone = relaid_alone(each.tokens_L)
            losses.append((self.model(alone, Output.TOKEN_LOSSES)[: len(each.mask_L)] * each.mask_L).sum())
            labels.append(float(each.mask_L.sum()))
        size = size or len(losses)
        groups = [slice(start, start + size) for start in range(0, len(losses), size)]
        loss = sum(sum(losses[group]) / sum(labels[group]) for group in groups) / len(groups)  # type: ignore[arg-type]
        assert isinstance(loss, torch.Tensor)
        found = torch.autograd.grad(loss, list(self.model.parameters()), allow_unused=True, materialize_grads=True)
        return float(loss.detach()), torch.cat([each.flatten() for each in found])


def relaid_alone(tokens_L: torch.Tensor) -> PackedRow:
    """A row of one conversation and nothing else."""
    row = make_row(RowKind.GENERATIVE, [len(tokens_L)], len(tokens_L))
    row.tokens_1T, row.labels_1T = tokens_L[None], tokens_L.roll(-1)[None]
    return row


@pytest.fixture(scope="module")
def measured() -> Iterator[Measured]:
    with parallel_job(ParallelConfig(device="cpu"), seed=1) as context:
        yield Measured(context)


def laid_out(layout: str, size: int = 1) -> StepBatch:
    batch = grit_batch([], rows(), 0, microbatch_sequences=size)
    how = LAYOUTS[layout]
    return relaid(batch, *how) if how else batch


def assert_equal(found: tuple[float, torch.Tensor], expected: tuple[float, torch.Tensor]) -> None:
    assert found[0] == pytest.approx(expected[0], rel=0, abs=TOLERANCE)
    assert float((found[1] - expected[1]).abs().max()) <= TOLERANCE


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_mean_over_labels_is_that_of_any_micro_batches(measured: Measured, layout: str) -> None:
    assert_equal(measured.step(laid_out(layout), "token"), measured.reference(None))


@pytest.mark.parametrize("size", SIZES)
def test_a_mean_of_means_is_that_of_its_micro_batches(measured: Measured, size: int) -> None:
    """Whatever rows they stand in: what a trainer of micro-batches of so many conversations computes."""
    expected = measured.reference(size)
    for layout in ("packed", "4 padded to the longest"):
        assert_equal(measured.step(laid_out(layout, size), "microbatch_mean"), expected)


def test_means_of_means_spread(measured: Measured) -> None:
    """The control of both: they differ from each other, and only all conversations at once give the mean of labels."""
    losses = {size: measured.step(laid_out("packed", size), "microbatch_mean")[0] for size in SIZES}
    token = measured.step(laid_out("packed"), "token")[0]
    assert losses[8] == pytest.approx(token, abs=TOLERANCE)
    assert len({round(loss, 3) for loss in losses.values()}) == len(SIZES)
