"""The processes that hold one model together: a job has one such group, or several that are independent.

A model-parallel group is the smallest set of processes that exchange anything in a forward pass: those of a tensor x
pipeline x context parallel mesh. Where experts are sharded over more processes than a stage of that mesh has, it is
several such meshes, its replicas: they embed different batches, but equally many, because experts wait for all of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from megatron_grit.models.decoder import GritDecoder
from megatron_grit.parallel.collectives import gather_json
from megatron_grit.parallel.context import ParallelContext


@dataclass(frozen=True, kw_only=True)
class ModelGroup:
    """This process's model-parallel group, and its place in it."""

    number: int
    """From 0 to ``num_groups - 1``."""
    num_groups: int
    size: int
    """Processes of a group."""
    leads: bool
    """Whether this process is the one of its group that reports or writes results."""
    replica: int
    """From 0 to ``num_replicas - 1``."""
    num_replicas: int
    replica_group: dist.ProcessGroup | None
    """The processes of the group that hold the same weights, one of each replica, in their order. None: one replica."""


def join_model_group(model: GritDecoder, timeout_minutes: float) -> ModelGroup:
    """This process's model-parallel group. Collective over all processes of the job.

    Args:
        model: this process's stage of the model.
        timeout_minutes: after which replicas stop waiting for each other.
    """
    context = model.context
    stage_size = context.tensor_size * context.context_size
    # The engine lays out the processes of a stage twice: tensor x context x data, and expert tensor x expert x the
    # rest. Each layout's groups are runs of consecutive processes.
    expert_size = (model.config.expert_tensor_parallel_size or context.tensor_size) * context.expert_size
    num_replicas = math.lcm(stage_size, expert_size) // stage_size
    assert context.data_size % num_replicas == 0, "the engine refuses such a mesh"
    number, replica = divmod(context.data_rank, num_replicas)
    num_groups = context.data_size // num_replicas
    return ModelGroup(
        number=number,
        num_groups=num_groups,
        size=context.world_size // num_groups,
        leads=(context.tensor_rank, context.context_rank, context.pipeline_rank, replica) == (0, 0, 0, 0),
        replica=replica,
        num_replicas=num_replicas,
        replica_group=_replica_group(context, number, num_replicas, timeout_minutes),
    )


def whole_job(context: ParallelContext) -> ModelGroup:
    """All processes of the job as one group, in which each data parallel rank is a replica."""
    return ModelGroup(
        number=0,
        num_groups=1,
        size=context.world_size,
        leads=context.rank == 0,
        replica=context.data_rank,
        num_replicas=context.data_size,
        replica_group=context.data_group if context.data_size > 1 else None,
    )


def _replica_group(
    context: ParallelContext, number: int, num_replicas: int, timeout_minutes: float
) -> dist.ProcessGroup | None:
    if num_replicas == 1:
        return None
    if num_replicas == context.data_size:
        return context.data_group
    members: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    place = (number, context.pipeline_rank, context.tensor_rank, context.context_rank)
    for rank, (data_rank, *key) in enumerate(gather_json([context.data_rank, *place], context)):
        members.setdefault(tuple(key), []).append((data_rank, rank))
    groups = [[rank for _, rank in sorted(held)] for held in members.values()]
    group, _ = dist.new_subgroups_by_enumeration(groups, timeout=timedelta(minutes=timeout_minutes))
    assert group is not None
    return group
