"""Where this process stands in the mesh. The only reader of the engine's ``parallel_state``."""

from __future__ import annotations

import gc
from contextlib import suppress
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True, kw_only=True)
class ParallelContext:
    """Ranks, sizes and process groups of this process, and the device it computes on."""

    device: torch.device
    rank: int
    world_size: int
    tensor_rank: int
    tensor_size: int
    pipeline_rank: int
    pipeline_size: int
    virtual_size: int | None
    """Chunks of layers on each stage under an interleaved pipeline."""
    context_rank: int
    context_size: int
    data_rank: int
    data_size: int
    expert_size: int
    sequence_parallel: bool
    tensor_group: dist.ProcessGroup
    pipeline_group: dist.ProcessGroup
    context_group: dist.ProcessGroup
    data_group: dist.ProcessGroup
    """Ranks that hold the same weights and the same part of other rows."""
    replica_group: dist.ProcessGroup
    """Data x context parallel: all ranks that hold the same weights."""

    @property
    def is_first_stage(self) -> bool:
        """Whether this process holds the input embedding."""
        return self.pipeline_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this process computes losses."""
        return self.pipeline_rank == self.pipeline_size - 1

    @property
    def last_stage_rank(self) -> int:
        """Global rank of this pipeline's last stage."""
        return dist.get_process_group_ranks(self.pipeline_group)[-1]

    @property
    def row_multiple(self) -> int:
        """Packed rows must be a multiple of this long, so that context and sequence parallel ranks get equal shares."""
        return 8 * self.tensor_size * self.context_size

    def describe(self) -> str:
        """This process's place, for messages: "rank 3 (tensor 1, pipeline 0, data 1)"."""
        place = f"tensor {self.tensor_rank}, pipeline {self.pipeline_rank}, data {self.data_rank}"
        if self.context_size > 1:
            place += f", context {self.context_rank}"
        return f"rank {self.rank} ({place})"


def read_context(device: torch.device, sequence_parallel: bool) -> ParallelContext:
    """Read the mesh that :func:`megatron_grit.parallel.launch.initialize` set up."""
    from megatron.core import parallel_state as state

    return ParallelContext(
        device=device,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        tensor_rank=state.get_tensor_model_parallel_rank(),
        tensor_size=state.get_tensor_model_parallel_world_size(),
        pipeline_rank=state.get_pipeline_model_parallel_rank(),
        pipeline_size=state.get_pipeline_model_parallel_world_size(),
        virtual_size=state.get_virtual_pipeline_model_parallel_world_size(),
        context_rank=state.get_context_parallel_rank(),
        context_size=state.get_context_parallel_world_size(),
        data_rank=state.get_data_parallel_rank(),
        data_size=state.get_data_parallel_world_size(),
        expert_size=state.get_expert_model_parallel_world_size(),
        sequence_parallel=sequence_parallel,
        tensor_group=state.get_tensor_model_parallel_group(),
        pipeline_group=state.get_pipeline_model_parallel_group(),
        context_group=state.get_context_parallel_group(),
        data_group=state.get_data_parallel_group(),
        replica_group=state.get_data_parallel_group(with_context_parallel=True),
    )


def build_mesh(
    tensor: int,
    pipeline: int,
    virtual_pipeline: int | None,
    context: int,
    expert: int,
    expert_tensor: int | None,
    timeout_minutes: float,
) -> None:
    """Create the engine's process groups."""
    from megatron.core import parallel_state as state

    state.initialize_model_parallel(
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        virtual_pipeline_model_parallel_size=virtual_pipeline,
        context_parallel_size=context,
        expert_model_parallel_size=expert,
        expert_tensor_parallel_size=expert_tensor,
        distributed_timeout_minutes=timeout_minutes,  # the engine makes a timedelta of it, fractions and all
        create_gloo_process_groups=True,
    )


def mesh_is_built() -> bool:
    """Whether the engine's process groups exist."""
    from megatron.core import parallel_state as state

    return state.model_parallel_is_initialized()


def destroy_mesh() -> None:
    """End the engine's process groups, which would leave their threads behind: some hundred a mesh."""
    from megatron.core import parallel_state as state

    groups = [group for group in state._global_process_group_list or [] if group not in (None, dist.GroupMember.WORLD)]
    state.destroy_model_parallel()
    for group in groups:
        with suppress(ValueError):  # the engine has ended some of them itself
            dist.destroy_process_group(group)
    groups.clear()
    gc.collect()  # models and optimizers hold groups, and each other
