"""Answer the prompts of conversations with a model and compare with the answers that stand there: BLEU.

On conversations that were trained on it is how much of them the model repeats. INPUT is what build-sft reads: JSONL of
messages (or ShareGPT's conversations, or lists of turns as text). The last answer of each is generated, greedily unless
--temperature is given, in the template of the checkpoint.

Example:
    megatron-grit evaluate answers --checkpoint runs/sft --input chats.jsonl --max-records 200 --output answers.jsonl

A line of OUTPUT has line, pred and answer. It serves as both files of "megatron-grit evaluate qa", for exact match, F1
and ROUGE: megatron-grit evaluate qa answers.jsonl answers.jsonl --rouge
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from megatron_grit.cli.main import command
from megatron_grit.config.knob import knob
from megatron_grit.config.options import ModelOptions, SamplingOptions


@dataclass(kw_only=True)
class EvaluateAnswersOptions(SamplingOptions, ModelOptions):
    """What is answered."""

    input: str = knob(path=True)
    """JSONL of conversations."""
    output: str = knob(path=True)
    """JSONL file for the answers."""
    max_records: int | None = knob(None, at_least=1)
    """Stop after so many conversations. null: all."""
    at_once: int = knob(16, at_least=1)
    """Conversations that are answered together."""


def run(options: EvaluateAnswersOptions) -> None:
    """Answer, compare, print."""
    from megatron_grit.evaluation.answers import write_answers

    report = write_answers(
        options.checkpoint,
        options.input,
        options.output,
        options,
        device=options.device,
        max_records=options.max_records,
        at_once=options.at_once,
    )
    print(f"{options.output}: {report.num_answers} answers, {report.num_equal} of them equal to the given ones")
    print(f"BLEU-4 {report.bleu:.2f} ({report.signature})")


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and compare. Returns the exit status."""
    return command(
        EvaluateAnswersOptions, run, argv, prog="megatron-grit evaluate answers", about=__doc__, resumes=True
    )


if __name__ == "__main__":
    sys.exit(main())
