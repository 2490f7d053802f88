"""Rerank a ranking by what a model generates, and measure both: nDCG, MAP, recall, MRR.

DATA is a folder of BEIR's: corpus.jsonl, queries.jsonl, qrels/test.tsv. The first documents of a ranking, by BM25, by
the model's own embeddings or of a file, are ordered by the logit of "yes" less that of "no" as its answer to whether
the passage is relevant, or by the log-probability of the query behind the passage.

Example:
    megatron-grit evaluate rerank --checkpoint runs/grit --data scifact --top-k 20 --output results/scifact_yes_no.json

OUTPUT has the figures; beside it stands OUTPUT.scores.jsonl with the scores of each query, from which a killed run
resumes.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, fields

from megatron_grit.cli.main import command
from megatron_grit.config.knob import knob
from megatron_grit.config.options import BatchSize, ModelOptions, TextLength
from megatron_grit.evaluation.ranking.options import RerankingOptions


@dataclass(kw_only=True)
class EvaluateRerankOptions(RerankingOptions, BatchSize, TextLength, ModelOptions):
    """What is reranked."""

    data: str = knob(path=True)
    """Folder of BEIR's."""
    split: str | None = None
    """Whose queries: the name of a file in qrels/. null: test, or the only one."""
    output: str = knob(path=True)
    """JSON file for the figures and their 95% intervals."""


def run(options: EvaluateRerankOptions) -> None:
    """Rerank, measure and print."""
    from megatron_grit.evaluation.ranking.run import evaluate_reranking
    from megatron_grit.evaluation.tasks.task import Lengths, format_figures

    lengths = Lengths(max_length=options.max_length, batch_tokens=options.batch_tokens)
    chosen = RerankingOptions(**{each.name: getattr(options, each.name) for each in fields(RerankingOptions)})
    figures = evaluate_reranking(
        options.checkpoint,
        options.data,
        options.output,
        chosen,
        lengths,
        split=options.split,
        device=options.device,
    )
    print(format_figures(figures))


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and rerank. Returns the exit status."""
    return command(EvaluateRerankOptions, run, argv, prog="megatron-grit evaluate rerank", about=__doc__, resumes=True)


if __name__ == "__main__":
    sys.exit(main())
