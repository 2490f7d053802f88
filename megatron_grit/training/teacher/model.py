"""A frozen model on the mesh of the run, or the base of its adapters, that says what rows are compared with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from megatron_grit import compat
from megatron_grit.config.schema.teacher import TeacherConfig
from megatron_grit.data.rows.batch import PackedRow
from megatron_grit.models.adapters import adapters_off
from megatron_grit.models.decoder import GritDecoder, Output
from megatron_grit.parallel import positions
from megatron_grit.parallel.context import ParallelContext
from megatron_grit.parallel.random import RandomState
from megatron_grit.training.step import run_schedule
from megatron_grit.training.teacher.targets import FullTarget, GoldTarget, TopTarget


class TeacherModel:
    """Runs rows through a model without a graph, dropout or noise, in the pipeline schedule of the run.

    Its final states of all rows of a step are kept on the last stage until the step has used them: numbers of the
    teacher's width for each token. Logits are made of a row's labels only, when their loss is computed.

    Args:
        config: the section.
        context: this process's place in the mesh.
        chunks: of this process; those that are trained, to take the base of their adapters.
        fingerprint: of their weights.
    """

    def __init__(
        self,
        config: TeacherConfig,
        context: ParallelContext,
        chunks: Sequence[GritDecoder],
        fingerprint: str | None = None,
    ) -> None:
        self.config, self.context, self.chunks, self.fingerprint = config, context, chunks, fingerprint

    def attach(self, rows: list[PackedRow], row_length: int) -> None:
        """As :class:`~megatron_grit.training.objectives.base.Teaches`."""
        wanted = Output.TOKEN_LOSSES if self.config.kind == "gold" else Output.HIDDEN
        with torch.no_grad(), frozen(self.chunks):
            outputs = forward_rows(self.chunks, self.context, rows, wanted, row_length, "teacher")
        compat.take_balancing_loss()  # of the teacher's experts
        for row, output in zip(rows, outputs, strict=False):  # none but on the last stage
            row.teacher = self._target(output)

    def _target(self, output: Tensor) -> FullTarget | GoldTarget:
        if self.config.kind == "gold":
            return GoldTarget(losses_T=output)
        last = self.chunks[-1]
        return FullTarget(states_T1D=output, logits=last.shard_logits, config=self.config, context=self.context)


class TeacherCache:
    """What a cache of a teacher says of rows, which the loader has read.

    Args:
        config: the section.
        context: this process's place in the mesh.
    """

    fingerprint: str | None = None

    def __init__(self, config: TeacherConfig, context: ParallelContext) -> None:
        self.config, self.context = config, context

    def attach(self, rows: list[PackedRow], row_length: int) -> None:
        """As :class:`~megatron_grit.training.objectives.base.Teaches`."""
        for row in rows:
            assert row.teacher_ids_TK is not None and row.teacher_log_probs_TK1 is not None
            row.teacher = TopTarget(
                ids_TK=row.teacher_ids_TK,
                log_probs_TK1=row.teacher_log_probs_TK1,
                config=self.config,
                context=self.context,
            )


def forward_rows(
    chunks: Sequence[GritDecoder],
    context: ParallelContext,
    rows: list[PackedRow],
    wanted: Output,
    row_length: int,
    position: str,
) -> list[Tensor]:
    """Run rows through all stages without a backward pass.

    Args:
        chunks: of this process.
        context: its place in the mesh.
        rows: of this data parallel rank, on the device.
        wanted: what the last stage makes of a row.
        row_length: T of the longest row of all ranks.
        position: what the run is at, for the watch.

    Returns:
        The output of each row, on the last stage; nothing on others.
    """
    # An interleaved pipeline takes no fewer rows than it has stages.
    missing = context.pipeline_size - len(rows) if len(chunks) > 1 else 0
    items = [*rows, *rows[-1:] * missing]

    def forward_step(iterator: Iterator[PackedRow], model: torch.nn.Module) -> tuple[Tensor, Callable[..., Any]]:
        positions.at(position)
        output = model(next(iterator), wanted)
        return output, lambda output: (output.new_zeros(()), {"output": output})

    reported = run_schedule(chunks, context, forward_step, items, row_length, forward_only=True)
    return [entry["output"] for entry in reported[: len(rows)]]


@contextmanager
def frozen(chunks: Sequence[GritDecoder], *, with_adapters: bool = False) -> Iterator[None]:
    """Dropout off, and adapters unless they are to stay; afterwards chunks and random states are as they were."""
    modes = [(module, module.training) for chunk in chunks for module in chunk.modules()]
    inputs = [chunk.decoder.input_tensor for chunk in chunks]
    random = RandomState.capture()
    try:
        for chunk in chunks:
            chunk.eval()
        with nullcontext() if with_adapters else adapters_off(chunks):
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        for chunk, states in zip(chunks, inputs, strict=True):
            chunk.set_input_tensor(states)
        random.restore()
