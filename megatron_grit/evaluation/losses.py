"""Writes the next-token loss of each record of a file."""

from __future__ import annotations

from pathlib import Path

from megatron_grit.config.checkpoint_folder import resolve_checkpoint
from megatron_grit.config.options import BatchSize
from megatron_grit.data.indexed.reader import file_paths
from megatron_grit.data.indexed.records import check_texts
from megatron_grit.evaluation.tasks.generative import LossReport, loss_figures, report_losses
from megatron_grit.evaluation.tasks.task import write_summary
from megatron_grit.store.files import check_output, json_text, replacing
from megatron_grit.store.logs import say_loading


def write_losses(
    checkpoint: str | Path,
    prefix: str,
    output: str | Path,
    *,
    device: str = "auto",
    batch_tokens: int = BatchSize.batch_tokens,
) -> LossReport:
    """Write a line of JSON for each record of a generative indexed file, in its order, and the mean beside it.

    A line has ``record`` (0-based), ``loss_sum`` (nats), ``num_tokens`` (supervised tokens that have a token before
    them) and ``loss``, the sum divided by the number, or null where it is 0.

    Args:
        checkpoint: checkpoint directory, or a run's output directory for its newest one.
        prefix: of the file, built with the checkpoint's tokenizer.
        output: JSONL file, written atomically; compressed where it ends in ``.gz``.
        batch_tokens: token budget of one forward pass.

    Returns:
        The mean over all tokens with its interval.

    Raises:
        GritError: input or a checkpoint that cannot be used, nothing supervised, a loss that is not finite, or an
            output that is input or cannot be written.
    """
    check_output(output, file_paths(prefix))
    check_texts(prefix)  # before the model: a file that is not there is found at once
    path = resolve_checkpoint(checkpoint)
    say_loading()
    from megatron_grit.inference.model import GritModel

    loss_sums, num_tokens = GritModel.load(path, device=device).token_losses(prefix, batch_tokens=batch_tokens)
    report = report_losses(loss_sums, num_tokens, prefix)
    with replacing(output) as file:
        for record, (total, count) in enumerate(zip(loss_sums.tolist(), num_tokens.tolist(), strict=True)):
            loss = total / count if count else None
            values = {"record": record, "loss_sum": total, "num_tokens": count, "loss": loss}
            file.write(json_text(values, allow_nan=False) + "\n")
    write_summary(output, loss_figures(report, "loss", {"checkpoint": str(checkpoint), "input": prefix}))
    return report
