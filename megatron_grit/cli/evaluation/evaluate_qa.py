"""Score answers with references: exact match, F1 of words and, with --rouge, ROUGE.

PREDICTIONS has an answer a line, in .jsonl {"pred": "text"}. REFERENCES has a question for each, in the same order: a
JSON list, or a line each, of {"answers": ["text", ...]} or {"answer": "text"}; null or an empty list is a question
without an answer. The best reference counts. Figures are from 0 to 1.

Scorers:
  squad2   as SQuAD 2.0's: right is the empty answer where there is none
  squad1   as SQuAD 1.1's: every question has an answer
  retro    as Retro's tools: "Answer:" and "A:" before an answer do not count against an exact match, punctuation parts
           words of F1, questions without an answer are left out

Example:
    megatron-grit evaluate qa answers.txt test.json --output scores.json
    megatron-grit evaluate qa summaries.jsonl test.jsonl --rouge
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Literal

from megatron_grit.cli.main import command
from megatron_grit.config.knob import knob


@dataclass(kw_only=True)
class EvaluateQaOptions:
    """What is scored, and how."""

    predictions: str = knob(positional=True, path=True)
    """File of answers."""
    references: str = knob(positional=True, path=True)
    """File of what is right."""
    output: str | None = knob(None, path=True)
    """JSON file for the figures and their 95 % intervals."""
    scorer: Literal["squad2", "squad1", "retro"] = "squad2"
    """Whose definition of exact match and F1."""
    no_answer: list[str] = knob([], verbatim=True)
    """Texts with which a model says that there is no answer; an answer that is one of them counts as empty."""
    rouge: bool = False
    """Also ROUGE-1, -2 and -L and their geometric mean, for summaries and long answers; needs rouge-score."""


def run(options: EvaluateQaOptions) -> None:
    """Score and print."""
    from megatron_grit.evaluation.qa.run import evaluate_answers, format_scores

    print(format_scores(evaluate_answers(**vars(options))))


def main(argv: list[str] | None = None, prog: str = "megatron-grit evaluate qa") -> int:
    """Parse the command line, score and print. Returns the exit status."""
    return command(EvaluateQaOptions, run, argv, prog=prog, about=__doc__)


if __name__ == "__main__":
    sys.exit(main())
