"""Collectives that the engine does not offer in the form needed here."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_grit.parallel.context import ParallelContext


def all_gather_rows(local_ND: Tensor, counts: list[int], group: dist.ProcessGroup) -> Tensor:
    """Concatenate tensors with different numbers of rows over a group.

    The own rows keep their graph and the others' have none: each rank then computes the whole loss, takes its
    gradient with respect to what it owns, and a sum over ranks is the gradient of the whole.

    Args:
        local_ND: this rank's rows, [counts[rank], D].
        counts: rows of each rank, known to all.
        group: ranks to gather over.

    Returns:
        [sum(counts), D], rank 0's rows first.
    """
    if len(counts) == 1:
        return local_ND
    rank, longest = dist.get_rank(group), max(counts)
    padded = local_ND.new_zeros(longest, local_ND.shape[1])
    padded[: counts[rank]] = local_ND.detach()
    gathered = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(gathered, padded, group=group)
    parts = [part[:count] for part, count in zip(gathered, counts, strict=True)]
    parts[rank] = local_ND
    return torch.cat(parts)


class _SumOverGroup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, group: dist.ProcessGroup) -> Tensor:
        total = values.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def sum_over_group(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum over ranks that each go on to compute the same loss from it.

    Each rank's own terms then have the gradient that they have in the sum. It is not summed over ranks: every one of
    them holds all of it already.
    """
    total = _SumOverGroup.apply(values, group)
    assert isinstance(total, Tensor)
    return total


def sum_over_replicas(values: Tensor, context: ParallelContext) -> Tensor:
    """Sum over data and context parallel ranks, in place."""
    if context.data_size * context.context_size > 1:
        dist.all_reduce(values, group=context.replica_group)
    return values


def from_last_stage(values: Tensor, context: ParallelContext) -> Tensor:
    """Copy the last pipeline stage's values to every stage, in place."""
    if context.pipeline_size > 1:
        dist.broadcast(values, src=context.last_stage_rank, group=context.pipeline_group)
    return values


def any_rank(flag: bool, context: ParallelContext) -> bool:
    """Whether the flag is set on any process of the job."""
    value = torch.tensor([float(flag)], device=context.device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return bool(value.item() > 0)
