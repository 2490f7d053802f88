"""What benchmarks/gpu_grit.py reports: numbers for a file, tables for docs/benchmarks.md."""

from __future__ import annotations

import datetime
import platform
import statistics
from dataclasses import dataclass
from typing import Any

import torch

from megatron_grit import compat
from megatron_grit.data.rows.batch import StepBatch
from megatron_grit.planning.operations import peak_tflops


@dataclass
class Measured:
    """One side's steps of one objective."""

    losses: dict[str, float]
    """Of the first step."""
    seconds: list[float]
    phases: dict[str, float]
    peak_bytes: int | None
    padded_tokens: list[int]


def machine(device: torch.device, precision: str, peak: float | None) -> dict[str, Any]:
    """Date, card, its peak at the precision of the run, and versions.

    Args:
        device: what was measured.
        precision: of the run.
        peak: in 10^12 operations a second. None: by the card's name, in bf16.
    """
    from transformers import __version__ as transformers_version

    on_cuda = device.type == "cuda"
    card = torch.cuda.get_device_name(device) if on_cuda else platform.processor() or platform.machine()
    versions = compat.installed_versions() | {
        "transformers": transformers_version,
        "TransformerEngine": compat.transformer_engine_version(),
        "CUDA": torch.version.cuda if on_cuda else None,
    }
    return {
        "date": datetime.date.today().isoformat(),
        "card": card,
        "peak_tflops": peak or (peak_tflops(card) if precision == "bf16" else None),
        "versions": {name: version for name, version in versions.items() if version is not None},
    }


def row_of(
    objective: str,
    side: str,
    measured: Measured,
    parts: list[StepBatch],
    flops: list[float],
    padded_tokens: list[int],
    peak: float | None,
) -> dict[str, Any]:
    """A line of the tables.

    Args:
        objective: what was trained.
        side: by whom.
        measured: the side's steps.
        parts: what of the timed batches it was trained on.
        flops: operations of each.
        padded_tokens: of each, padding included.
        peak: of the card, in 10^12 operations a second.
    """
    tokens = [part.num_tokens for part in parts]
    rate = statistics.median(count / seconds for count, seconds in zip(flops, measured.seconds, strict=True)) / 1e12
    speeds = (count / seconds for count, seconds in zip(tokens, measured.seconds, strict=True))
    return {
        "objective": objective,
        "side": side,
        "seconds": statistics.median(measured.seconds),
        "seconds_by_step": measured.seconds,
        "tokens_per_second": statistics.median(speeds),
        "padding_fraction": 1 - sum(tokens) / sum(padded_tokens),
        "tflops": rate,
        "mfu": None if peak is None else rate / peak,
        "peak_bytes": measured.peak_bytes,
        "phases": measured.phases,
        "first_losses": measured.losses,
    }


def markdown(report: dict[str, Any]) -> str:
    """The tables for docs/benchmarks.md."""
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    peak = "no peak stated" if report["peak_tflops"] is None else f"peak {report['peak_tflops']:g} TFLOP/s"
    lines = [
        f"{report['card']} ({peak}), {report['date']}, {versions}. {report['layers']} layers of scale "
        f"{report['scale']}, {report['precision']}, attention backend {report['attention_backend']}; "
        f"{report['queries']} queries, {report['passages']} passages and {report['sequences']} conversations a step, "
        f"rows of {report['tokens_per_row']} tokens; medians of {report['steps']} steps.",
        "",
        "| objective | | seconds a step | tokens/s | padding | TFLOP/s | MFU | peak GiB | speed |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        mfu = "" if row["mfu"] is None else f"{row['mfu']:.1%}"
        memory = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**30:.1f}"
        lines.append(
            f"| {row['objective']} | {row['side']} | {row['seconds']:.3f} | {row['tokens_per_second']:,.0f} "
            f"| {row['padding_fraction']:.1%} | {row['tflops']:.4g} | {mfu} | {memory} | {row['speed']:.2f} |"
        )
    lines += ["", "Seconds of the phases of one more step, the GPU waited for in between:", ""]
    for row in report["rows"]:
        phases = ", ".join(f"{name} {seconds:.3f}" for name, seconds in row["phases"].items())
        lines.append(f"- {row['objective']}, {row['side']}: {phases}")
    return "\n".join(lines) + "\n"
