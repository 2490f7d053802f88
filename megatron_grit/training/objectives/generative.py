"""Next-token loss on generative rows."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from megatron_grit.config.schema import RunConfig
from megatron_grit.data.rows.batch import PackedRow, StepBatch
from megatron_grit.losses.next_token import next_token_loss
from megatron_grit.models.decoder import Output
from megatron_grit.parallel.context import ParallelContext
from megatron_grit.parallel.random import RandomState


class Objective:
    """Each row's share of the token loss; the shares of the global batch's rows add up to it."""

    output = Output.TOKEN_LOSSES

    def __init__(self, config: RunConfig, context: ParallelContext) -> None:
        self.config = config

    def rows(self, batch: StepBatch) -> list[PackedRow]:
        """The rows of a step that this objective trains on."""
        return batch.generative_rows

    def prepare(self, batch: StepBatch, rows: list[PackedRow], forward_all: Callable[..., list[Tensor]]) -> None:
        """Take note of the step's counts, by which every row's loss is divided."""
        self.batch = batch

    def random_state(self, chunk: int, index: int) -> RandomState | None:
        """Random state to run a row's forward pass from. None: go on from the present one."""
        return None

    def row_loss(self, index: int, row: PackedRow, output: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """A row's share of the loss to train on, and of the metrics, which are summed over rows and ranks."""
        assert row.loss_mask_1T is not None
        share = next_token_loss(
            output,
            row.loss_mask_1T[0],
            self.config.loss.loss_gen_type,
            num_loss_tokens=self.batch.num_loss_tokens,
            num_sequences=self.batch.num_sequences,
            num_rows=self.batch.num_generative_rows,
        )
        return share * self.config.loss.loss_gen_factor, {"loss_gen": share.detach()}
