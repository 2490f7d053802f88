"""Measure retrieval with a model's embeddings: nDCG, MAP, recall, precision and MRR, by exact search.

DATA is a folder of BEIR's (corpus.jsonl, queries.jsonl, qrels/test.tsv), JSONL of query and pos records, or a folder of
one of USEB's tasks. CHECKPOINT may be a directory of Hugging Face or sentence-transformers as well.

Example:
    megatron-grit evaluate retrieval --checkpoint runs/grit --data scifact --output results/scifact.json \\
        --query-instruction "Given a scientific claim, retrieve documents that support or refute the claim"

The same command resumes a killed run on a folder of BEIR's after the last 8,192 documents.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from megatron_grit.cli.main import command
from megatron_grit.config.knob import knob
from megatron_grit.config.options import BatchSize, ModelOptions, TextLength


@dataclass(kw_only=True)
class EvaluateRetrievalOptions(BatchSize, TextLength, ModelOptions):
    """What is measured."""

    data: str = knob(path=True)
    """Folder or file."""
    split: str | None = None
    """Whose queries: the name of a file in qrels/. null: test, or the only one."""
    query_instruction: str | None = knob("", text=True)
    """What queries of a folder are embedded for. null: the bare text. In JSONL instructions stand beside texts."""
    document_instruction: str | None = knob("", text=True)
    """Likewise of documents."""
    layer: int | None = knob(None, at_least=0)
    """Embed from the states after this layer of a checkpoint, 0 for the embedded tokens. null: after the last."""
    output: str = knob(path=True)
    """JSON file for the figures and their 95% intervals."""


def run(options: EvaluateRetrievalOptions) -> None:
    """Evaluate and print."""
    from megatron_grit.evaluation.ranking.run import evaluate_collection
    from megatron_grit.evaluation.tasks.task import Lengths, format_figures

    settings = vars(options).copy()
    lengths = Lengths(max_length=settings.pop("max_length"), batch_tokens=settings.pop("batch_tokens"))
    print(format_figures(evaluate_collection(lengths=lengths, **settings)))


def main(argv: list[str] | None = None) -> int:
    """Parse the command line, evaluate and print. Returns the exit status."""
    return command(
        EvaluateRetrievalOptions, run, argv, prog="megatron-grit evaluate retrieval", about=__doc__, resumes=True
    )


if __name__ == "__main__":
    sys.exit(main())
