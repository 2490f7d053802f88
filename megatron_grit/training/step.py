"""One optimizer step: every row of every kind through one pipeline schedule, one gradient reduction."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_grit import compat
from megatron_grit.config.kinds import metric_names
from megatron_grit.config.schema import RunConfig
from megatron_grit.config.shape import mixture_layers
from megatron_grit.data.rows.batch import PackedRow, StepBatch
from megatron_grit.errors import ConfigError
from megatron_grit.models.decoder import Output
from megatron_grit.parallel import positions
from megatron_grit.parallel.collectives import from_last_stage, sum_over_replicas
from megatron_grit.parallel.context import ParallelContext
from megatron_grit.parallel.random import RandomState, replay
from megatron_grit.training.nonfinite import NonFiniteGuard, RowOutcomes
from megatron_grit.training.objectives.base import Teaches, trained_objectives


class TrainStep:
    """Forward, backward, reduction and update for one global batch.

    Args:
        config: the run.
        context: this process's place in the mesh.
        model: this process's pipeline stage, or its chunks, wrapped for data parallelism.
        optimizer: the engine's optimizer over it.
        teacher: of ``loss.teacher``.
    """

    def __init__(
        self,
        config: RunConfig,
        context: ParallelContext,
        model: DistributedDataParallel | Sequence[DistributedDataParallel],
        optimizer: Any,
        teacher: Teaches | None = None,
    ) -> None:
        self.config, self.context = config, context
        self.chunks = list(model) if isinstance(model, Sequence) else [model]
        self.optimizer = optimizer
        self.guard = NonFiniteGuard(config, context)
        self.outcomes = RowOutcomes()
        compat.take_balancing_loss()  # an earlier model's
        self.objectives = trained_objectives(config, context)
        for objective in self.objectives:
            objective.teacher = teacher

    def __call__(self, batch: StepBatch) -> dict[str, float]:
        """Train on a batch; the learning rate is the one that the optimizer has.

        Returns:
            loss, the losses and other metrics of each objective, grad_norm and, for a mixture, loss_balance; the same
            on all ranks. With ``training.on_nan`` skip also skipped_steps, the number of steps of the run that were
            not taken.

        Raises:
            NumericsError: a loss or the gradient is not finite. Weights and optimizer are as before the step.
        """
        for chunk in self.chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        positions.enter("starting", batch.step + 1)
        metrics = self.accumulate_gradients(batch)
        # The optimizer's own step computes the norm, clips by it and updates without a look at it, so it is asked for
        # the norm first. Both calls may be repeated.
        positions.at("gradient norm")
        self.optimizer.prepare_grads()
        metrics["grad_norm"] = float(self.optimizer.get_grad_norm())
        if self.guard.takes_step(batch, metrics, self.outcomes, self.chunks):
            positions.at("optimizer")
            succeeded, _, _ = self.optimizer.step()
            assert succeeded, "the engine skips steps in fp16 only"
        if self.config.training.on_nan == "skip":
            metrics["skipped_steps"] = self.guard.num_skipped
        return metrics

    def accumulate_gradients(self, batch: StepBatch) -> dict[str, float]:
        """Add the batch's gradients, reduced over ranks, to the gradient buffers."""
        work: list[tuple[Any, int, PackedRow]] = []
        self.outcomes = RowOutcomes()
        for objective in self.objectives:
            rows = [row.to(self.context.device) for row in objective.rows(batch)]
            if rows:
                objective.prepare(batch, rows, self._forward_all_for(batch))
                work += [(objective, index, row) for index, row in enumerate(rows)]
        # The engine divides each loss by the number of micro-batches and averages over data parallel ranks; these
        # losses are shares of a sum already. It multiplies by the context parallel size, over which it averages too.
        scale = len(work) * self.context.data_size

        def forward_step(iterator: Iterator[Any], model: torch.nn.Module) -> tuple[Tensor, Callable[..., Any]]:
            objective, index, row = next(iterator)
            positions.at(f"{row.kind} forward and backward", index, len(objective.rows(batch)))
            with replay(objective.random_state(self.chunks.index(model), index)):
                output = model(row, objective.output)

            def loss_function(output: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
                self.outcomes.add(row, index, output)
                loss, row_metrics = objective.row_loss(index, row, output)
                return loss * scale, row_metrics

            return output, loss_function

        reported = self._run_schedule(forward_step, work, batch.row_length, forward_only=False)
        positions.at("sum of losses")
        return self._reduce_metrics(reported, len(work))

    def _forward_all_for(self, batch: StepBatch) -> Callable[..., list[Tensor]]:
        def forward_all(
            rows: list[PackedRow], output: Output, random_states: dict[tuple[int, int], RandomState]
        ) -> list[Tensor]:
            def forward_step(
                iterator: Iterator[tuple[int, PackedRow]], model: torch.nn.Module
            ) -> tuple[Tensor, Callable]:
                index, row = next(iterator)
                positions.at("first pass", index, len(items))
                random_states[self.chunks.index(model), index] = RandomState.capture()
                states = model(row, output)
                return states, lambda states: (states.new_zeros(()), {"output": states})

            # An interleaved pipeline takes no fewer rows than it has stages.
            missing = self.context.pipeline_size - len(rows) if len(self.chunks) > 1 else 0
            items = list(enumerate(rows)) + [(len(rows) + extra, rows[-1]) for extra in range(missing)]
            with torch.no_grad():
                reported = self._run_schedule(forward_step, items, batch.row_length, forward_only=True)
            positions.at("loss of the global batch")
            return [entry["output"] for entry in reported[: len(rows)]]

        return forward_all

    def _run_schedule(
        self, forward_step: Callable[..., Any], items: list[Any], row_length: int, *, forward_only: bool
    ) -> list[dict[str, Tensor]]:
        return run_schedule(self.chunks, self.context, forward_step, items, row_length, forward_only=forward_only)

    def _reduce_metrics(self, reported: list[dict[str, Tensor]], num_rows: int) -> dict[str, float]:
        names = metric_names(objective.kind for objective in self.objectives)
        names += [name for objective in self.objectives for name in objective.extra_metrics]
        values = torch.zeros(len(names), device=self.context.device)
        for entry in reported:
            for place, name in enumerate(names):
                if name in entry:
                    values[place] += entry[name]
        values = from_last_stage(sum_over_replicas(values, self.context), self.context)
        metrics = dict(zip(names, values.tolist(), strict=True))
        metrics["loss"] = sum(objective.total(metrics) for objective in self.objectives)
        balance = self._balancing_loss(num_rows)
        return metrics if balance is None else metrics | {"loss_balance": balance}

    def _balancing_loss(self, num_rows: int) -> float | None:
        """Mean over layers, rows and data parallel ranks; 1 when every expert gets the same."""
        values = compat.take_balancing_loss()
        if self.config.model.num_experts is None or self.config.model.moe_aux_loss_coeff == 0:
            return None
        if values is None:
            values = torch.zeros(1)
        total = values.sum().to(self.context.device) / (len(mixture_layers(self.config.model)) * num_rows)
        if self.context.pipeline_size > 1:
            torch.distributed.all_reduce(total, group=self.context.pipeline_group)
        if self.context.sequence_parallel:  # each tensor parallel rank logged the part of its tokens
            torch.distributed.all_reduce(total, group=self.context.tensor_group)
        return float(sum_over_replicas(total, self.context)) / self.context.data_size


def run_schedule(
    chunks: Sequence[Any],
    context: ParallelContext,
    forward_step: Callable[..., Any],
    items: list[Any],
    row_length: int | None,
    *,
    forward_only: bool,
) -> list[dict[str, Tensor]]:
    """Run the engine's schedule; returns what the loss functions reported, on the last stage.

    Args:
        chunks: of this process, as they are to be called.
        context: its place in the mesh.
        forward_step: takes the next item through a chunk; see the engine's ``forward_backward_func``.
        items: of this data parallel rank, one a row; an interleaved pipeline takes no fewer than it has stages.
        row_length: T of the longest row; of no matter without pipeline stages.
        forward_only: there is no backward pass.
    """
    interleaved = len(chunks) > 1
    if interleaved:
        chunks[0].config.microbatch_group_size_per_vp_stage = rows_in_turn(len(items), context.pipeline_size)
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(items) for _ in chunks] if interleaved else iter(items),
        model=list(chunks) if interleaved else chunks[0],
        num_microbatches=len(items),
        seq_length=row_length,
        micro_batch_size=1,
        forward_only=forward_only,
    )


def rows_in_turn(num_rows: int, num_stages: int) -> int:
    """Rows that an interleaved pipeline takes through one chunk before it turns to the next.

    The engine wants at least as many as there are stages, and as many left over at the end, or none. The fewest that
    do keep the fewest activations.

    Raises:
        ConfigError: fewer rows than stages.
    """
    for group_size in range(num_stages, num_rows + 1):
        if num_rows % group_size == 0 or num_rows % group_size >= num_stages:
            return group_size
    raise ConfigError(
        f"a step has {num_rows} rows on a data parallel rank, fewer than the {num_stages} stages of an interleaved "
        f"pipeline; set data.num_rows_multiple to {num_stages} x the data parallel size, or parallel.virtual_pipeline "
        "to null"
    )
