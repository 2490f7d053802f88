"""Collectives that the engine does not offer in the form needed here."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_grit.parallel.context import ParallelContext


def gather_in_order(local_LD: Tensor, places_by_rank: list[Tensor], group: dist.ProcessGroup) -> Tensor:
    """All ranks' rows in one tensor, each at its place, without a graph.

    Args:
        local_LD: this rank's rows; ranks may have different numbers of them.
        places_by_rank: for each rank the places of its rows, known to all: int64, together 0..N-1.
        group: ranks to gather over.

    Returns:
        [N, D], a new tensor.
    """
    ordered_ND = local_LD.new_empty(sum(map(len, places_by_rank)), local_LD.shape[1])
    places_by_rank = [places.to(local_LD.device) for places in places_by_rank]
    if len(places_by_rank) == 1:
        ordered_ND[places_by_rank[0]] = local_LD.detach()
        return ordered_ND
    longest = max(map(len, places_by_rank))
    padded = local_LD.new_zeros(longest, local_LD.shape[1])
    padded[: len(local_LD)] = local_LD.detach()
    gathered = local_LD.new_empty(len(places_by_rank) * longest, local_LD.shape[1])
    dist.all_gather_into_tensor(gathered, padded, group=group)
    for places, part in zip(places_by_rank, gathered.split(longest), strict=True):
        ordered_ND[places] = part[: len(places)]
    return ordered_ND


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


def max_over_group(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Largest of each element over ranks, without a graph."""
    largest = values.clone()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    return largest


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


def largest_of_ranks(numbers: Sequence[int], context: ParallelContext) -> list[int]:
    """The largest that any process of the job has, of each of some numbers."""
    values = torch.tensor(numbers, device=context.device)
    dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return [int(value) for value in values.tolist()]


def from_rank_0(number: int, context: ParallelContext) -> int:
    """The number that the job's first process has, on all of them."""
    value = torch.tensor([number], device=context.device)
    dist.broadcast(value, src=0)
    return int(value.item())


def all_ranks_arrive(name: str, context: ParallelContext, seconds: float) -> bool:
    """Whether every process of the job comes to this place within a time; false where one is stuck or gone.

    It is asked of the job's key-value store, not by a collective, which a missing rank would leave hanging.

    Args:
        name: of the place, used once in a job.
        context: this process's place in the mesh.
        seconds: to wait for the others.
    """
    store = dist.distributed_c10d._get_default_store()
    store.set(f"{name}/{context.rank}", "here")
    try:
        store.wait([f"{name}/{rank}" for rank in range(context.world_size)], timedelta(seconds=seconds))
    except RuntimeError:  # DistStoreError is one
        return False
    return True


def gather_json(value: Any, context: ParallelContext) -> list[Any]:
    """Every process's value, on every process, in the order of ranks. For values of any length that JSON can hold."""
    encoded = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(context.device)
    lengths = [torch.zeros(1, dtype=torch.int64, device=context.device) for _ in range(context.world_size)]
    dist.all_gather(lengths, torch.tensor([len(encoded)], device=context.device))
    longest = int(max(lengths))
    padded = torch.zeros(longest, dtype=torch.uint8, device=context.device)
    padded[: len(encoded)] = encoded
    parts = [torch.empty_like(padded) for _ in range(context.world_size)]
    dist.all_gather(parts, padded)
    return [json.loads(bytes(part[: int(length)].tolist())) for part, length in zip(parts, lengths, strict=True)]


def json_from_rank_0(value: Any, context: ParallelContext) -> Any:
    """What the job's first process gives, on all of them; what others give is left. For values that JSON can hold."""
    encoded = json.dumps(value).encode() if context.rank == 0 else b""
    length = from_rank_0(len(encoded), context)
    content = torch.zeros(length, dtype=torch.uint8)
    if context.rank == 0:
        content = torch.frombuffer(bytearray(encoded), dtype=torch.uint8)
    content = content.to(context.device)
    dist.broadcast(content, src=0)
    return json.loads(content.cpu().numpy().tobytes())
