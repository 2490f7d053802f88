"""Start and end of a process: device, process group, mesh, seeds. Under torchrun or srun, or alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_grit.config.schema import ParallelConfig
from megatron_grit.errors import MeshError
from megatron_grit.parallel.context import ParallelContext, build_mesh, destroy_mesh, mesh_is_built, read_context
from megatron_grit.parallel.devices import select_device
from megatron_grit.parallel.rendezvous import join_job
from megatron_grit.store.environment import check_job, job_size

_MINUTES_TO_START = 10.0


def initialize(config: ParallelConfig, seed: int, device_option: str = "parallel.device") -> ParallelContext:
    """Join the job and build the mesh.

    Ranks come from ``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``, ``MASTER_ADDR`` and ``MASTER_PORT`` as torchrun sets them;
    without them this process is the whole job. A process group that exists already is used as it is.

    Args:
        config: the mesh and the device.
        seed: of the random states.
        device_option: where the user chose the device, for messages.

    Raises:
        ConfigError: ``config.device`` is cuda and there is no GPU, or these variables are not those of a job.
        MeshError: the number of processes does not divide into the mesh.
    """
    device = select_device(config.device, device_option)
    if device.type == "cpu":
        from megatron_grit.parallel import cpu_backend

        cpu_backend.install()
    if not dist.is_initialized():
        _init_process_group(device, config.timeout_minutes)
    model_size = config.tensor * config.pipeline * config.context
    if dist.get_world_size() % model_size:
        raise MeshError(
            f"{dist.get_world_size()} processes do not divide by tensor {config.tensor} x pipeline {config.pipeline} "
            f"x context {config.context}; start a multiple of {model_size} processes"
        )
    if mesh_is_built():
        destroy_mesh()
    build_mesh(
        config.tensor,
        config.pipeline,
        config.virtual_pipeline,
        config.context,
        config.expert,
        config.expert_tensor,
        config.timeout_minutes,
    )
    _seed_all(seed)
    return read_context(device, config.sequence_parallel)


def _init_process_group(device: torch.device, timeout_minutes: float) -> None:
    store: dist.Store = dist.HashStore()
    rank, world_size = 0, 1
    check_job()
    if job_size() > 1:
        store, rank, world_size = join_job(timedelta(minutes=max(timeout_minutes, _MINUTES_TO_START)))
    dist.init_process_group(
        backend="gloo" if device.type == "cpu" else "nccl",
        timeout=timedelta(minutes=timeout_minutes),
        device_id=device if device.type == "cuda" else None,
        store=store,
        rank=rank,
        world_size=world_size,
    )


def _seed_all(seed: int) -> None:
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


@contextmanager
def parallel_job(config: ParallelConfig, seed: int) -> Iterator[ParallelContext]:
    """:func:`initialize`, and at the end drop what it set up; a process group that was there before stays."""
    owns_process_group = not dist.is_initialized()
    try:
        yield initialize(config, seed)
    finally:
        destroy_mesh()
        if owns_process_group and dist.is_initialized():
            dist.destroy_process_group()
