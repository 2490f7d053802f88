"""The processes that hold one model together. A job has one such team, or several that do not hear of each other.

A team is the smallest set of processes that exchange anything in a forward pass: those of a tensor, pipeline and
context parallel mesh and, where experts are spread over more processes than such a stage has, several of these meshes.
Each of them is then a lane: lanes embed different batches, but have to do so equally often.
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
class Team:
    """This process's team and its place in it."""

    number: int
    """Of 0 to ``num_teams - 1``."""
    num_teams: int
    size: int
    """Processes of a team."""
    leads: bool
    """Whether it is the one process of its team that tells others what came out."""
    lane: int
    """Of 0 to ``num_lanes - 1``."""
    num_lanes: int
    lane_group: dist.ProcessGroup | None
    """The processes of the team that hold what this one holds, one of each lane, in their order. None: one lane."""


def join_team(model: GritDecoder, timeout_minutes: float) -> Team:
    """This process's team. Collective over all processes of the job.

    Args:
        model: this process's stage of the model.
        timeout_minutes: after which lanes give up waiting for each other.
    """
    context = model.context
    stage_size = context.tensor_size * context.context_size
    # The engine lays out the processes of a stage twice: tensor x context x data, and expert tensor x expert x the
    # rest. Each layout's groups are runs of consecutive processes.
    expert_size = (model.config.expert_tensor_parallel_size or context.tensor_size) * context.expert_size
    num_lanes = math.lcm(stage_size, expert_size) // stage_size
    assert context.data_size % num_lanes == 0, "the engine refuses such a mesh"
    number, lane = divmod(context.data_rank, num_lanes)
    num_teams = context.data_size // num_lanes
    return Team(
        number=number,
        num_teams=num_teams,
        size=context.world_size // num_teams,
        leads=(context.tensor_rank, context.context_rank, context.pipeline_rank, lane) == (0, 0, 0, 0),
        lane=lane,
        num_lanes=num_lanes,
        lane_group=_lane_group(context, number, num_lanes, timeout_minutes),
    )


def _lane_group(
    context: ParallelContext, team: int, num_lanes: int, timeout_minutes: float
) -> dist.ProcessGroup | None:
    if num_lanes == 1:
        return None
    if num_lanes == context.data_size:
        return context.data_group
    members: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    place = (team, context.pipeline_rank, context.tensor_rank, context.context_rank)
    for rank, (data_rank, *key) in enumerate(gather_json([context.data_rank, *place], context)):
        members.setdefault(tuple(key), []).append((data_rank, rank))
    groups = [[rank for _, rank in sorted(held)] for held in members.values()]
    group, _ = dist.new_subgroups_by_enumeration(groups, timeout=timedelta(minutes=timeout_minutes))
    assert group is not None
    return group
