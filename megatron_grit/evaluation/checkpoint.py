"""Evaluates a model: retrieval, similarity and next-token loss, written to one JSON file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_grit.config.checkpoint_folder import holds_checkpoint, resolve_checkpoint
from megatron_grit.config.options import BatchSize, TextLength
from megatron_grit.data.indexed.reader import file_paths
from megatron_grit.data.indexed.records import check_texts
from megatron_grit.errors import ConfigError
from megatron_grit.evaluation.bootstrap import Interval
from megatron_grit.evaluation.encoder import is_model_folder, load_encoder, model_fingerprint
from megatron_grit.evaluation.ranking.collection import Collection, UnfinishedRanking
from megatron_grit.evaluation.tasks import generative as generative_task
from megatron_grit.evaluation.tasks import reranking as reranking_task
from megatron_grit.evaluation.tasks import retrieval as retrieval_task
from megatron_grit.evaluation.tasks import sts as sts_task
from megatron_grit.evaluation.tasks import useb as useb_task
from megatron_grit.evaluation.tasks.task import Figures, Lengths
from megatron_grit.store.files import check_output, write_json
from megatron_grit.store.logs import get_logger

log = get_logger(__name__)

TASKS: dict[str, Any] = {
    "retrieval": retrieval_task,
    "sts": sts_task,
    "reranking": reranking_task,
    "useb": useb_task,
    "generative": generative_task,
    "perplexity": generative_task,
}
"""Each task by the option that gives its data, and by its name among ``evaluation.tasks`` of a run."""


def evaluate_checkpoint(  # many: the data of each task
    checkpoint: str | Path,
    output: str | Path,
    *,
    retrieval: str | Path | None = None,
    sts: str | Path | None = None,
    generative: str | None = None,
    device: str = "auto",
    max_length: int = TextLength.max_length,
    batch_tokens: int = BatchSize.batch_tokens,
) -> dict[str, Any]:
    """Evaluate a model and write the figures, each with its 95 % bootstrap interval, to ``output``.

    Args:
        checkpoint: checkpoint directory, or a run's output directory for its newest one; for ``retrieval`` and ``sts``
            also a directory of Hugging Face or sentence-transformers.
        output: JSON file, written atomically.
        retrieval: JSONL of embedding records, where every positive is a candidate for every query; or a folder of
            BEIR's.
        sts: .csv, .tsv or .jsonl of pairs of sentences with scores.
        generative: prefix of a generative indexed file.
        max_length: longest text in tokens.
        batch_tokens: tokens that are embedded at a time.

    Returns:
        The contents of the file.

    Raises:
        GritError: nothing to evaluate, input that cannot be used, or an output that is input or cannot be written.
    """
    lengths = Lengths(max_length=max_length, batch_tokens=batch_tokens)
    paths = {"retrieval": retrieval, "sts": sts, "generative": generative}
    if not any(path is not None for path in paths.values()):
        raise ConfigError("nothing to evaluate; give --retrieval, --generative, --sts or several of them")
    reads = [path for path in (retrieval, sts) if path is not None]
    check_output(output, [*reads, *(file_paths(generative) if generative is not None else ())])
    if generative is not None and not holds_checkpoint(checkpoint) and is_model_folder(checkpoint):
        raise ConfigError(f"{checkpoint}: --generative takes a checkpoint; import it with megatron-grit convert")
    if generative is not None:
        check_texts(generative)  # before the model
    read = {name: TASKS[name].read(path) for name, path in paths.items() if path is not None}
    return run_tasks(checkpoint, output, read, lengths, device=device)


def run_tasks(
    checkpoint: str | Path,
    output: str | Path,
    tasks: Mapping[str, Any],
    lengths: Lengths,
    *,
    device: str = "auto",
    layer: int | None = None,
) -> dict[str, Any]:
    """Evaluate a model on what tasks have read, and write the figures. A killed ranking of a collection resumes.

    Args:
        checkpoint: as for :func:`evaluate_checkpoint`, and so are the others.
        tasks: by the names of :data:`TASKS`.
        layer: as for :func:`~megatron_grit.evaluation.encoder.load_encoder`.

    Returns:
        The contents of the file.
    """
    figures: dict[str, Any] = {"checkpoint": str(checkpoint)}
    if holds_checkpoint(checkpoint):
        from megatron_grit.training.checkpoint import read_state

        state = read_state(resolve_checkpoint(checkpoint))
        figures |= {"step": state["step"], "world_size": state["world_size"]}
    if layer is not None:
        figures["layer"] = layer
    model = load_encoder(checkpoint, device, layer)
    partial = Path(output).with_name(f".{Path(output).name}.partial")
    intervals: dict[str, Interval] = {}
    for name, data in tasks.items():
        log.info(f"measuring {name}")
        if isinstance(data, Collection):
            follows_from = [model_fingerprint(checkpoint, model), device, layer]
            data = replace(data, unfinished=UnfinishedRanking(path=partial, model=follows_from))
        found = TASKS[name].run(model, data, lengths)
        intervals |= found.intervals
        figures |= found.others
    figures = Figures(intervals=intervals, others=figures).contents()
    write_json(output, figures)
    partial.unlink(missing_ok=True)
    return figures
