"""Rows through a model at any layout, without a graph.

The rows go through the engine's pipeline schedule; the replicas of a model-parallel group (:mod:`model_group`) share
them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_grit.data.rows.batch import PackedRow
from megatron_grit.data.rows.packing import pack
from megatron_grit.inference.model_group import ModelGroup
from megatron_grit.models.decoder import GritDecoder, Output
from megatron_grit.parallel import positions
from megatron_grit.parallel.context import ParallelContext
from megatron_grit.training.step import run_schedule

WINDOW = 8192
"""Texts whose rows are packed at a time, so that memory does not grow with the corpus."""


def share_out(lengths: np.ndarray, budget: int, num_replicas: int) -> list[np.ndarray]:
    """Batches of texts; if there are enough texts, their number is a multiple of the replicas.

    Args:
        lengths: int [N], tokens of each text.
        budget: tokens of a batch.
        num_replicas: they take batches in turn.

    Returns:
        The texts of each batch: int64, together 0 to N - 1.
    """
    batches = pack(lengths, budget)
    if len(batches) % num_replicas and -(-len(batches) // num_replicas) * num_replicas <= len(lengths):
        return pack(lengths, budget, num_replicas)
    return batches


def common_length(context: ParallelContext, lengths: list[int]) -> int | None:
    """Length to which all rows are padded: stages exchange tensors of one shape, and the ranks of a tensor or context
    parallel group hold equal parts. None: no padding needed."""
    if context.tensor_size * context.context_size * context.pipeline_size == 1:
        return None
    multiple = context.row_multiple if context.tensor_size * context.context_size > 1 else 1
    return -(-max(lengths) // multiple) * multiple


def forward_batches(
    chunks: Sequence[GritDecoder],
    group: ModelGroup,
    batches: list[np.ndarray],
    row_of: Callable[[np.ndarray, int | None], PackedRow],
    row_length: int | None,
    output: Output,
    advance: Callable[[int], Any],
) -> list[Tensor]:
    """Outputs of this replica's batches, ``batches[replica::num_replicas]``, on the last stage; nothing on others.

    All processes of a group call it with the same batches. Where some replicas have no batch in the last round, or an
    interleaved pipeline has fewer rounds than stages, batches are computed again and their outputs come last.

    Args:
        chunks: of this process's pipeline stage.
        group: its model-parallel group.
        batches: the texts of each.
        row_of: makes the row of a batch, of a length; called in every chunk.
        row_length: of all rows, :func:`common_length`.
        output: what of the model is wanted.
        advance: told of the number of texts of a round, of all replicas.
    """
    context, num_replicas = chunks[0].context, group.num_replicas
    rounds = [batches[first : first + num_replicas] for first in range(0, len(batches), num_replicas)]
    missing = context.pipeline_size - len(rounds) if len(chunks) > 1 else 0
    items = [*enumerate(rounds), *[(len(rounds), rounds[-1])] * missing]

    def forward_step(
        iterator: Iterator[tuple[int, list[np.ndarray]]], stage: torch.nn.Module
    ) -> tuple[Tensor, Callable[..., Any]]:
        number, several = next(iterator)
        positions.at("forward pass", number, len(items))
        # In the last round there may be fewer batches than replicas. All compute: experts wait for all of them.
        row = row_of(several[min(group.replica, len(several) - 1)], row_length)
        found = stage(row.to(context.device), output)
        if number < len(rounds) and stage is chunks[-1]:
            advance(sum(map(len, several)))
        return found, lambda found: (found.new_zeros(()), {"output": found})

    reported = run_schedule(chunks, context, forward_step, items, row_length, forward_only=True)
    return [entry["output"] for entry in reported]
