"""Plans a run: its needs at the configured mesh, which other meshes fit and how fast, and why others are impossible."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from megatron_grit.config.checks.evaluation import evaluation_lines
from megatron_grit.config.checks.problem import Problem
from megatron_grit.config.checks.run import data_parallel_size, find_problems, mesh_summary
from megatron_grit.config.kinds import kind_names, kind_options
from megatron_grit.config.schema import RunConfig
from megatron_grit.config.workload import TextLengths
from megatron_grit.planning.memory import Device, Memory, Workload, estimate_memory
from megatron_grit.planning.operations import Flops, Machine, StepTime, count_flops, expected_step_time
from megatron_grit.planning.parameters import Parameters, count_parameters

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Parameters, memory, operations and time of a run at one mesh."""

    mesh: str
    parallel: dict[str, Any]
    parameters: Parameters
    memory: Memory
    flops: Flops
    step_time: StepTime
    workload: Workload


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """An impossible mesh, and why."""

    mesh: str
    reason: str


@dataclass(kw_only=True)
class Plan:
    """What ``megatron-grit plan`` prints."""

    world_size: int
    memory_bytes: int
    machine: Machine
    lengths: TextLengths
    device: Device
    configured: Estimate | None = None
    problems: list[str] = field(default_factory=list)
    """Why the configuration is impossible, at its own mesh."""
    candidates: list[Estimate] = field(default_factory=list)
    """Meshes that fit the memory, fastest first."""
    too_large: list[Estimate] = field(default_factory=list)
    """Meshes that do not fit, smallest first."""
    refused: list[Refusal] = field(default_factory=list)
    retro_project: str | None = None
    """The database that the run reads, which is planned for by another command."""
    evaluation: list[str] = field(default_factory=list)
    """What is measured inside the run, which step times leave out."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON: bytes, seconds, operations."""
        plan = dataclasses.asdict(self)
        for entry, estimate in [
            (plan["configured"], self.configured),
            *zip(plan["candidates"], self.candidates, strict=True),
            *zip(plan["too_large"], self.too_large, strict=True),
        ]:
            if estimate is not None:
                entry["memory"]["peak"] = estimate.memory.peak
                entry["step_time"]["total"] = estimate.step_time.total
                entry["flops"]["total"] = estimate.flops.total
        return plan


def problems_of(config: RunConfig, world_size: int) -> list[Problem]:
    """What makes a run impossible, inputs that are not there yet left out."""
    inputs = {"data.tokenizer", "data.retro_project", *(kind_options(kind).DATA for kind in kind_names())}
    return [problem for problem in find_problems(config, world_size, files=False) if problem.key not in inputs]


def estimate_run(
    config: RunConfig,
    world_size: int,
    vocab_size: int,
    lengths: TextLengths,
    machine: Machine,
    device: Device = "cuda",
) -> Estimate:
    """Needs of a possible run."""
    workload = Workload.of_config(config, data_parallel_size(config, world_size), lengths)
    memory = estimate_memory(config, world_size, vocab_size, workload, device)
    return Estimate(
        mesh=mesh_label(config, world_size),
        parallel=dataclasses.asdict(config.parallel),
        parameters=count_parameters(config, vocab_size, memory.stage),
        memory=memory,
        flops=count_flops(config, world_size, vocab_size, workload),
        step_time=expected_step_time(config, world_size, vocab_size, workload, machine),
        workload=workload,
    )


def make_plan(
    config: RunConfig,
    world_size: int,
    vocab_size: int,
    *,
    lengths: TextLengths | None = None,
    machine: Machine | None = None,
    memory_gib: float = 80.0,
    device: Device = "cuda",
) -> Plan:
    """Needs at the configured mesh, and every other mesh of as many processes.

    Args:
        vocab_size: of the model before padding.
        lengths: of the data.
        machine: peak and bandwidths.
        memory_gib: of a device.
        device: kind of device.
    """
    lengths, machine = lengths or TextLengths(), machine or Machine()
    plan = Plan(
        world_size=world_size, memory_bytes=int(memory_gib * GIB), machine=machine, lengths=lengths, device=device
    )
    plan.retro_project, plan.evaluation = config.data.retro_project, evaluation_lines(config)
    plan.problems = [problem.message for problem in problems_of(config, world_size)]
    if not plan.problems:
        plan.configured = estimate_run(config, world_size, vocab_size, lengths, machine, device)
    for variant in meshes(config, world_size):
        problems = problems_of(variant, world_size)
        if problems:
            plan.refused.append(Refusal(mesh=mesh_label(variant, world_size), reason=problems[0].message))
            continue
        estimate = estimate_run(variant, world_size, vocab_size, lengths, machine, device)
        fits = estimate.memory.peak <= plan.memory_bytes
        (plan.candidates if fits else plan.too_large).append(estimate)
    plan.candidates.sort(key=lambda estimate: (estimate.step_time.total, estimate.memory.peak))
    plan.too_large.sort(key=lambda estimate: estimate.memory.peak)
    return plan


def meshes(config: RunConfig, world_size: int) -> Iterator[RunConfig]:
    """Copies of a configuration with every tensor x pipeline x context x expert x data parallel split of the processes.

    With tensor parallelism both with and without sequence parallelism.
    """
    sizes = [size for size in range(1, world_size + 1) if world_size % size == 0]
    for tensor in sizes:
        for pipeline in (size for size in sizes if world_size % (tensor * size) == 0):
            for context in (size for size in sizes if world_size % (tensor * pipeline * size) == 0):
                stage = world_size // pipeline
                experts = [size for size in sizes if stage % size == 0] if config.model.num_experts else [1]
                for expert in experts:
                    for sequence_parallel in (False, True) if tensor > 1 else (False,):
                        variant = copy.deepcopy(config)
                        parallel = variant.parallel
                        parallel.tensor, parallel.pipeline, parallel.context = tensor, pipeline, context
                        parallel.expert, parallel.sequence_parallel = expert, sequence_parallel
                        if pipeline == 1:
                            parallel.virtual_pipeline = None
                        yield variant


def mesh_label(config: RunConfig, world_size: int) -> str:
    """The mesh in one line, sequence parallelism named."""
    return mesh_summary(config, world_size) + (", sequence parallel" if config.parallel.sequence_parallel else "")
