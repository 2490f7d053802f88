"""Measure how a model's cosines rank pairs of sentences: Spearman's and Pearson's correlation with scores of people.

DATA has two sentences and a score a line: .csv or .tsv with the columns sentence1, sentence2 and score, in this order
where there are no headings, or .jsonl with these keys. CHECKPOINT may be a directory of Hugging Face or
sentence-transformers as well.

Example:
    megatron-grit evaluate sts --checkpoint runs/grit --data stsb.csv --output results/stsb.json \\
        --instruction "Retrieve semantically similar text"
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from megatron_grit.cli.main import command
from megatron_grit.config.knob import knob
from megatron_grit.config.options import BatchSize, ModelOptions, TextLength


@dataclass(kw_only=True)
class EvaluateStsOptions(BatchSize, TextLength, ModelOptions):
    """What is measured."""

    data: str = knob(path=True)
    """File of pairs."""
    instruction: str | None = knob("", text=True)
    """What sentences are embedded for. null: the bare text."""
    layer: int | None = knob(None, at_least=0)
    """Embed from the states after this layer of a checkpoint, 0 for the embedded tokens. null: after the last."""
    output: str = knob(path=True)
    """JSON file for the figures and their 95% intervals."""


def run(options: EvaluateStsOptions) -> None:
    """Evaluate and print."""
    from megatron_grit.evaluation.checkpoint import run_tasks
    from megatron_grit.evaluation.tasks import sts
    from megatron_grit.evaluation.tasks.task import Lengths, format_figures
    from megatron_grit.store.files import check_output

    check_output(options.output, [options.data])
    tasks = {"sts": sts.read(options.data, options.instruction)}
    lengths = Lengths(max_length=options.max_length, batch_tokens=options.batch_tokens)
    figures = run_tasks(options.checkpoint, options.output, tasks, lengths, device=options.device, layer=options.layer)
    print(format_figures(figures))


def main(argv: list[str] | None = None) -> int:
    """Parse the command line, evaluate and print. Returns the exit status."""
    return command(EvaluateStsOptions, run, argv, prog="megatron-grit evaluate sts", about=__doc__)


if __name__ == "__main__":
    sys.exit(main())
