"""Evaluates a checkpoint: retrieval and next-token loss, written to one JSON file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_grit.config.checkpoint_folder import resolve_checkpoint
from megatron_grit.config.options import BatchSize, TextLength
from megatron_grit.data.indexed.reader import file_paths
from megatron_grit.errors import ConfigError
from megatron_grit.evaluation.bootstrap import Interval
from megatron_grit.evaluation.tasks import generative as generative_task
from megatron_grit.evaluation.tasks import retrieval as retrieval_task
from megatron_grit.evaluation.tasks.task import Figures, Lengths
from megatron_grit.store.files import check_output, write_json
from megatron_grit.store.logs import get_logger, say_loading

log = get_logger(__name__)

TASKS: dict[str, Any] = {"retrieval": retrieval_task, "generative": generative_task, "perplexity": generative_task}
"""Each task by the option that gives its data, and by its name among ``evaluation.tasks`` of a run."""


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
    reads = [path for path in [retrieval] if path is not None]
    check_output(output, [*reads, *(file_paths(generative) if generative is not None else ())])
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
    figures = Figures(intervals=intervals, others=figures).contents()
    write_json(output, figures)
    return figures
