"""What an optimizer step asks of each kind of row that it trains."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from torch import Tensor

from megatron_grit.config.kinds import kind_weight, load_kind, loss_name, trained_kinds
from megatron_grit.config.schema import RunConfig
from megatron_grit.data.rows.batch import PackedRow, StepBatch
from megatron_grit.data.rows.stream import RowStream
from megatron_grit.models.decoder import GritDecoder, Output
from megatron_grit.parallel.context import ParallelContext
from megatron_grit.parallel.random import RandomState

OBJECTIVES = "megatron_grit.training.objectives"
"""Folder with a file for each kind of row."""


class Teaches(Protocol):
    """A model that predicted rows are compared with."""

    fingerprint: str | None
    """Of its weights; None where they are those of the base, or in a cache."""

    def attach(self, rows: list[PackedRow], row_length: int) -> None:
        """Say of each row what it is compared with: its ``teacher``. Collective over the ranks that hold the model.

        Args:
            rows: of a step, on the device.
            row_length: T of the longest row of the step.
        """


@dataclass(frozen=True, kw_only=True)
class RunStart:
    """What an objective may want of a run before its first step."""

    step: int
    """Steps that were trained."""
    streams: Mapping[str, RowStream]
    """Of the run's kinds."""
    chunks: Sequence[GritDecoder]
    """Of this process, with the weights to go on from."""
    pad_id: int
    """Token of the padding."""
    base: str | None = None
    """Fingerprint of the base of adapters; None where nothing was loaded for one."""
    saved: Mapping[str, Any] | None = None
    """What :meth:`Objective.start` returned when the run began, of the checkpoint that it resumes from. None: it begins
    here."""


class Objective(ABC):
    """How one kind of row is trained.

    Args:
        config: the run.
        context: this process's place in the mesh.
    """

    kind: ClassVar[str]
    """Name of the kind."""
    output: ClassVar[Output]
    """What the last pipeline stage makes of a row."""
    teacher: Teaches | None = None
    """Of ``loss.teacher``."""

    def __init__(self, config: RunConfig, context: ParallelContext) -> None:
        self.config, self.context = config, context
        self.weight = kind_weight(config, self.kind)
        """Weight of its loss in the loss of a step."""
        self.loss_name = loss_name(self.kind)
        self.extra_metrics: list[str] = []
        """Names of what :meth:`row_loss` reports beside the metrics of the kind."""

    def start(self, run: RunStart) -> dict[str, Any]:
        """Prepare for the steps of a run. Collective.

        Returns:
            What checkpoints are to keep for a resumed run, for JSON.

        Raises:
            GritError: what the objective needs is not there.
        """
        return {}

    def rows(self, batch: StepBatch) -> list[PackedRow]:
        """The rows of a step that this objective trains on."""
        return batch.rows_of(self.kind)

    def prepare(self, batch: StepBatch, rows: list[PackedRow], forward_all: Callable[..., list[Tensor]]) -> None:
        """Keep the step and the counts that its losses are divided by.

        Args:
            batch: the step.
            rows: its rows of this kind, on the device.
            forward_all: runs rows through all stages without a graph; returns the outputs on the last stage, and
                notes the random state of each chunk of layers and row in the dictionary it is given.
        """
        self.batch, self.counts = batch, batch.counts_of(self.kind)

    def random_state(self, chunk: int, index: int) -> RandomState | None:
        """Random state to run a row's forward pass through a chunk of layers from. None: from the present one."""
        return None

    def total(self, metrics: Mapping[str, float]) -> float:
        """The part of a step's loss that is this objective's, weight included, by the metrics of the step."""
        return self.weight * metrics[self.loss_name]

    @abstractmethod
    def row_loss(self, index: int, row: PackedRow, output: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """A row's share of the loss to train on, weight included, and its shares of the metrics.

        Metrics are summed over rows and ranks.
        """


def trained_objectives(config: RunConfig, context: ParallelContext) -> list[Objective]:
    """The objectives of the kinds that a run trains."""
    return [load_kind(OBJECTIVES, kind).OBJECTIVE(config, context) for kind in trained_kinds(config)]
