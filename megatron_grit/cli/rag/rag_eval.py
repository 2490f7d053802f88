"""Answer a file of questions with the passages that they find: EM, match and F1.

Example:
  megatron-grit rag eval --checkpoint runs/grit --project-dir rag --input questions.jsonl --output answers.jsonl
"""

from __future__ import annotations

import sys

from megatron_grit.cli.main import command
from megatron_grit.evaluation.qa.options import RagEvaluation


def run(options: RagEvaluation) -> None:
    """Answer, score, and print the figures."""
    from megatron_grit.evaluation.qa.rag import evaluate_rag
    from megatron_grit.evaluation.tasks.task import format_figures

    print(format_figures(evaluate_rag(options)))


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and evaluate. Returns the exit status."""
    return command(RagEvaluation, run, argv, prog="megatron-grit rag eval", about=__doc__, resumes=True)


if __name__ == "__main__":
    sys.exit(main())
