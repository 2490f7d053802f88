"""Measure a model: retrieval, similarity and next-token loss on held-out data.

For retrieval and similarity CHECKPOINT may be a directory of Hugging Face or sentence-transformers as well.

Example:
    megatron-grit evaluate --checkpoint runs/grit --retrieval heldout.jsonl --generative heldout_gen --output after.json
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from megatron_grit.cli.main import command
from megatron_grit.config.knob import knob
from megatron_grit.config.options import BatchSize, ModelOptions, TextLength


@dataclass(kw_only=True)
class EvaluateOptions(BatchSize, TextLength, ModelOptions):
    """What is measured."""

    retrieval: str | None = knob(None, path=True)
    """JSONL of query and pos records, for recall@1, recall@10, nDCG@10; or a folder of BEIR's (corpus.jsonl,
    queries.jsonl, qrels/), for nDCG, MAP, recall, precision and MRR at 1 to 1000."""
    sts: str | None = knob(None, path=True)
    """Pairs of sentences with scores, .csv, .tsv or .jsonl; Spearman's and Pearson's correlation."""
    generative: str | None = knob(None, path=True)
    """Prefix of a generative indexed file; next-token loss."""
    output: str = knob(path=True)
    """JSON file for the figures and their 95% intervals."""


def run(options: EvaluateOptions) -> None:
    """Evaluate and print."""
    from megatron_grit.evaluation.checkpoint import evaluate_checkpoint
    from megatron_grit.evaluation.tasks.task import format_figures

    print(format_figures(evaluate_checkpoint(**vars(options))))


def main(argv: list[str] | None = None) -> int:
    """Parse the command line, evaluate and print. Returns the exit status."""
    return command(EvaluateOptions, run, argv, prog="megatron-grit evaluate", about=__doc__)


if __name__ == "__main__":
    sys.exit(main())
