"""Evaluations inside a run: what the loop asks of those who evaluate, and a model for them that goes back unchanged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from megatron.core.distributed import DistributedDataParallel

from megatron_grit import compat
from megatron_grit.config.schema import RunConfig
from megatron_grit.data.chat.chat import Chat
from megatron_grit.data.text.tokenizer import Tokenizer
from megatron_grit.models.decoder import GritDecoder
from megatron_grit.parallel import positions
from megatron_grit.parallel.context import ParallelContext
from megatron_grit.training.audit.undisturbed import undisturbed
from megatron_grit.training.optimizer import gather_weights

EVALUATION = "eval/"
"""What the names of figures of ``evaluation.tasks`` begin with among the metrics of a step."""


class Evaluator(Protocol):
    """Measures the model of a run, on the run's mesh."""

    def __call__(self, chunks: Sequence[GritDecoder], step: int) -> dict[str, float]:
        """Figures by NAME/FIGURE, the same on all ranks. Collective.

        Args:
            chunks: of this process's pipeline stage, with dropout off.
            step: steps that were trained.
        """
        ...


class EvaluatorSource(Protocol):
    """Makes an evaluator once the process has its place in the mesh; its data were read before."""

    def __call__(self, config: RunConfig, context: ParallelContext, tokenizer: Tokenizer, chat: Chat) -> Evaluator:
        """The evaluator of a run."""
        ...


def evaluate_undisturbed(
    evaluator: Evaluator, config: RunConfig, wrapped: Sequence[DistributedDataParallel], step: int
) -> dict[str, float]:
    """Figures of the weights of now, under the names that metrics have. Training goes on as if it had not been
    measured. Collective.

    Args:
        evaluator: of the run.
        config: the run.
        wrapped: the chunks of the model, as the optimizer knows them.
        step: steps that were trained.
    """
    positions.enter("evaluation", step)
    if config.parallel.overlap:
        gather_weights(wrapped)
    with undisturbed(wrapped) as chunks, torch.no_grad():
        figures = evaluator(chunks, step)
    compat.take_balancing_loss()
    return {EVALUATION + name: value for name, value in figures.items()}
