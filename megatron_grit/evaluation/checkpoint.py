"""Evaluates a checkpoint: retrieval and next-token loss, written to one JSON file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_grit.config.checkpoint_folder import resolve_checkpoint
from megatron_grit.config.options import BatchSize, TextLength
from megatron_grit.errors import ConfigError
from megatron_grit.evaluation.bootstrap import Interval
from megatron_grit.evaluation.tasks import generative as generative_task
from megatron_grit.evaluation.tasks import retrieval as retrieval_task
from megatron_grit.evaluation.tasks.task import Lengths
from megatron_grit.store.files import check_output, write_json
from megatron_grit.store.logs import get_logger, say_loading

log = get_logger(__name__)

TASKS: dict[str, Any] = {"retrieval": retrieval_task, "generative": generative_task}
"""Each task by the option that gives its data."""


def evaluate_checkpoint(
    checkpoint: str | Path,
    output: str | Path,
    *,
    retrieval: str | Path | None = None,
    generative: str | None = None,
    device: str = "auto",
    max_length: int = TextLength.max_length,
    batch_tokens: int = BatchSize.batch_tokens,
) -> dict[str, Any]:
    """Evaluate a checkpoint and write the figures, each with its 95 % bootstrap interval, to ``output``.

    Args:
        checkpoint: checkpoint directory, or a run's output directory for its newest one.
        output: JSON file, written atomically.
        retrieval: JSONL of embedding records; every positive is a candidate for every query.
        generative: prefix of a generative indexed file.
        max_length: longest text in tokens.
        batch_tokens: tokens that are embedded at a time.

    Returns:
        The contents of the file.

    Raises:
        GritError: nothing to evaluate, input that cannot be used, or an output that is input or cannot be written.
    """
    lengths = Lengths(max_length=max_length, batch_tokens=batch_tokens)
    paths = {"retrieval": retrieval, "generative": generative}
    if not any(path is not None for path in paths.values()):
        raise ConfigError("nothing to evaluate; give --retrieval, --generative or both")
    reads = [retrieval, *map(Path, (f"{generative}.bin", f"{generative}.idx", f"{generative}.json"))]
    check_output(output, [path for path in reads if path is not None])
    read = {name: TASKS[name].read(path) for name, path in paths.items() if path is not None}
    path = resolve_checkpoint(checkpoint)
    say_loading()
    from megatron_grit.inference.model import GritModel
    from megatron_grit.training.checkpoint import read_state

    state = read_state(path)
    model = GritModel.load(path, device=device)
    figures: dict[str, Any] = {"checkpoint": str(checkpoint), "step": state["step"], "world_size": state["world_size"]}
    intervals: dict[str, Interval] = {}
    for name, data in read.items():
        log.info(f"measuring {name} on {paths[name]}")
        found = TASKS[name].run(model, data, lengths)
        intervals |= found.intervals
        figures |= found.others
    figures |= {name: interval.value for name, interval in intervals.items()}
    figures["intervals"] = {name: [interval.low, interval.high] for name, interval in intervals.items()}
    write_json(output, figures)
    return figures


def format_figures(figures: dict[str, Any]) -> str:
    """Lines for a terminal: each figure with its interval, and the figure of a random order."""
    lines = []
    for name, (low, high) in figures["intervals"].items():
        chance = figures.get(f"chance_{name}")
        note = "" if chance is None else f"   chance {chance:.3f}"
        lines.append(f"{name:14s} {figures[name]:8.3f}   95 % interval {low:.3f} to {high:.3f}{note}")
    return "\n".join(lines)
