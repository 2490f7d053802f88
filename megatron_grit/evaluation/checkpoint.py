"""Evaluates a checkpoint: retrieval and next-token loss, written to one JSON file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from megatron_grit.data.text.markers import Side
from megatron_grit.errors import ConfigError
from megatron_grit.evaluation.bootstrap import Interval
from megatron_grit.evaluation.perplexity import evaluate_perplexity
from megatron_grit.evaluation.retrieval import Instructed, encode_instructed, evaluate_retrieval, read_retrieval_set
from megatron_grit.store.files import write_json


def evaluate_checkpoint(
    checkpoint: str | Path,
    output: str | Path,
    *,
    retrieval: str | Path | None = None,
    generative: str | None = None,
    device: str = "auto",
    max_length: int = 512,
    batch_tokens: int = 8192,
) -> dict[str, Any]:
    """Evaluate a checkpoint and write the figures, each with its 95 % bootstrap interval, to ``output``.

    Args:
        checkpoint: checkpoint directory, or a run's output directory for its newest one.
        output: JSON file, written atomically.
        retrieval: JSONL of embedding records; every positive is a candidate for every query.
        generative: prefix of a generative indexed file.
        device: auto, cpu or cuda.
        max_length: longest text in tokens.
        batch_tokens: tokens that are embedded at a time.

    Returns:
        The contents of the file.

    Raises:
        GritError: nothing to evaluate, or input that cannot be used.
    """
    if retrieval is None and generative is None:
        raise ConfigError("nothing to evaluate; give --retrieval, --generative or both")
    task = None if retrieval is None else read_retrieval_set(retrieval)
    from megatron_grit.inference.model import GritModel
    from megatron_grit.training.checkpoint import read_state, resolve_checkpoint

    path = resolve_checkpoint(checkpoint)
    state = read_state(path)
    model = GritModel.load(path, device=device)
    figures: dict[str, Any] = {"checkpoint": str(checkpoint), "step": state["step"], "world_size": state["world_size"]}
    intervals: dict[str, Interval] = {}
    if task is not None:

        def embed(given: list[Instructed], side: Side) -> np.ndarray:
            def encode(texts: list[str], instruction: str | None) -> np.ndarray:
                return model.encode(texts, instruction, side=side, max_length=max_length, batch_tokens=batch_tokens)

            return encode_instructed(given, encode)

        queries, passages = embed(task.queries, "query"), embed(task.passages, "passage")
        report = evaluate_retrieval(queries, passages, task.relevant)
        for name in ("recall_at_1", "recall_at_10", "ndcg_at_10"):
            intervals[name] = getattr(report, name)
        for name in ("chance_recall_at_1", "chance_recall_at_10", "num_queries", "num_passages"):
            figures[name] = getattr(report, name)
    if generative is not None:
        loss = evaluate_perplexity(model, generative)
        intervals["lm_loss"] = loss.loss
        figures |= {"perplexity": loss.perplexity, "num_records": loss.num_records, "num_tokens": loss.num_tokens}
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
