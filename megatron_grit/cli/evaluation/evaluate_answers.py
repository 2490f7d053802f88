"""Answer conversations, AlpacaEval, MT-Bench or XSTest; compare with answers that stand there, or find refusals.

On conversations that were trained on it is how much of them the model repeats. INPUT is what build-sft reads: JSONL of
messages (or ShareGPT's conversations, or lists of turns as text). The last answer of each is generated, greedily unless
--temperature is given, in the template of the checkpoint.

Example:
    megatron-grit evaluate answers --checkpoint runs/sft --input chats.jsonl --max-records 200 --output answers.jsonl
    megatron-grit evaluate answers --format alpaca_eval --checkpoint runs/sft --input alpaca_eval.json --output out.json

A line of OUTPUT has line, pred and answer (of conversations; the judges' files have their own forms). It serves as both
files of "megatron-grit evaluate qa", for exact match, F1 and ROUGE:
    megatron-grit evaluate qa answers.jsonl answers.jsonl --rouge
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, Literal

from megatron_grit.cli.main import command
from megatron_grit.config.knob import knob
from megatron_grit.config.options import ModelOptions, SamplingOptions


@dataclass(kw_only=True)
class EvaluateAnswersOptions(SamplingOptions, ModelOptions):
    """What is answered."""

    input: str = knob(path=True)
    """JSONL of conversations, or the questions of a benchmark."""
    output: str = knob(path=True)
    """File for the answers."""
    format: Literal["conversations", "alpaca_eval", "mt_bench", "xstest"] = "conversations"
    """Of the files. alpaca_eval and mt_bench: their questions, and answers as their judges read them. xstest: its table
    of prompts; refusals are found by the words that an answer begins with."""
    generator: str | None = None
    """Name of the model in files of alpaca_eval and mt_bench. null: that of the checkpoint's folder."""
    max_records: int | None = knob(None, at_least=1)
    """Stop after so many conversations. null: all."""
    at_once: int = knob(16, at_least=1)
    """Conversations that are answered together."""


def run(options: EvaluateAnswersOptions) -> None:
    """Answer, compare, print."""
    from megatron_grit.evaluation.answers import write_answers
    from megatron_grit.evaluation.judged_answers import write_judged_answers
    from megatron_grit.evaluation.refusals import xstest_lines

    files = (options.checkpoint, options.input, options.output, options)
    how: dict[str, Any] = {name: getattr(options, name) for name in ("device", "max_records", "at_once")}
    if options.format != "conversations":
        count = write_judged_answers(*files, form=options.format, generator=options.generator, **how)
        print(f"{options.output}: {count} answers")
        if options.format == "xstest":
            print("\n".join(xstest_lines(options.output)))
        return
    report = write_answers(*files, **how)
    print(f"{options.output}: {report.num_answers} answers, {report.num_equal} of them equal to the given ones")
    print(f"BLEU-4 {report.bleu:.2f} ({report.signature})")


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and compare. Returns the exit status."""
    return command(
        EvaluateAnswersOptions, run, argv, prog="megatron-grit evaluate answers", about=__doc__, resumes=True
    )


if __name__ == "__main__":
    sys.exit(main())
