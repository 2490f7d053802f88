"""The estimate of ``megatron-grit plan`` for the rows that a run really has, printed beside what was measured."""

from __future__ import annotations

import resource
from contextlib import suppress
from pathlib import Path

import torch

from megatron_grit.config.kinds import kind_options, measured_passes
from megatron_grit.config.schema import RunConfig
from megatron_grit.config.workload import RowWorkload
from megatron_grit.data.rows.batch import BatchPart, StepBatch
from megatron_grit.parallel.context import ParallelContext
from megatron_grit.planning.memory import Device, Workload, estimate_memory
from megatron_grit.planning.operations import count_flops
from megatron_grit.planning.parameters import count_parameters
from megatron_grit.planning.text import format_bytes
from megatron_grit.store.logs import get_logger

log = get_logger(__name__)

_STEPS = 2
"""Adam's states are made in the first step, so the second is the first with everything in memory."""


class MemoryMeter:
    """Peak memory of this process since the meter was made: of the allocator on CUDA, resident on the CPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._before = torch.cuda.memory_allocated(device)
            return
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # forget the peak of what came before
        self._before = _status("VmRSS") or _max_resident()

    def peak(self) -> int:
        """Bytes above what was there at the start."""
        if self._device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self._device)) - self._before
        return (_status("VmHWM") or _max_resident()) - self._before


def _status(key: str) -> int | None:
    """Bytes of an entry of /proc/self/status; None where there is no such file."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) * 1024
    return None


def _max_resident() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class EstimateReport:
    """Looks at the first steps and then writes one short block to the log, on rank 0.

    Args:
        config: the run.
        context: this process's place in the mesh.
        vocab_size: of the model before padding.
        meter: made before the model was.
    """

    def __init__(self, config: RunConfig, context: ParallelContext, vocab_size: int, meter: MemoryMeter) -> None:
        self._config, self._context, self._vocab_size, self._meter = config, context, vocab_size, meter
        self._seen: list[Workload] = []
        self.estimated_bytes = self.measured_bytes = 0

    def after_step(self, batch: StepBatch, seconds: float) -> None:
        """Record a step; after the second, report."""
        if len(self._seen) == _STEPS:
            return
        self._seen.append(workload_of(self._config, batch, self._context.data_size))
        if len(self._seen) < _STEPS:
            return
        config, world_size = self._config, self._context.world_size
        device: Device = "cuda" if self._context.device.type == "cuda" else "cpu"
        estimates = [
            estimate_memory(config, world_size, self._vocab_size, workload, device, stage=self._context.pipeline_rank)
            for workload in self._seen
        ]
        memory = max(estimates, key=lambda estimate: estimate.peak)
        self.estimated_bytes, self.measured_bytes = memory.peak, self._meter.peak()
        parameters = count_parameters(config, self._vocab_size, self._context.pipeline_rank)
        flops = count_flops(config, world_size, self._vocab_size, self._seen[-1]).total / world_size
        kinds = ", ".join(f"{kind} {format_bytes(count)}" for kind, count in memory.kinds.items() if count)
        log.info(
            f"parameters: {parameters.total:,}, {parameters.rank:,} on this rank\n"
            f"memory of this rank: {format_bytes(self.estimated_bytes)} estimated, "
            f"{format_bytes(self.measured_bytes)} measured, peak of {_STEPS} steps ({kinds})\n"
            f"step {batch.step + 1}: {flops:.2e} operations a rank in {seconds:.2f} s, "
            f"{flops / seconds / 1e12:.2f} TFLOP/s"
        )


def workload_of(config: RunConfig, batch: StepBatch, data_size: int) -> Workload:
    """The rows of a step as the estimate takes them. Rows of other ranks are taken to be as long as this rank's."""
    return Workload(kinds=tuple(_rows_of(config, kind, part, data_size) for kind, part in batch.parts.items()))


def _rows_of(config: RunConfig, kind: str, part: BatchPart, data_size: int) -> RowWorkload:
    rows, embeds = part.rows, kind_options(kind).EMBEDS
    tokens = sum(row.num_tokens for row in rows) * data_size
    return RowWorkload(
        kind=kind,
        embeds=embeds,
        causal=config.embedding.causal or not embeds,
        tokens=tokens,
        rows=len(rows) * data_size,
        segment_tokens=tokens / max(part.counts.num_segments, 1),
        row_tokens=max((row.tokens_1T.shape[1] for row in rows), default=0),
        row_labels=max(
            (int(row.loss_mask_1T.count_nonzero()) for row in rows if row.loss_mask_1T is not None), default=0
        ),
        samples=part.counts.num_samples,
        segments=part.counts.num_segments,
        labels=part.counts.num_labels,
        measured=measured_passes(config, kind),
        rows_beside=len(part.baseline) * data_size,
    )
