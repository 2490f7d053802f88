"""Questions with contexts and answers to an indexed file for supervised fine-tuning.

The input is a JSON list, JSON lines, or a file of SQuAD's form. A question has "question" (a text, a dialogue that
begins with "User:", or a list of turns), "answers" or "answer", of which the first is trained, and contexts: "ctxs"
({"title", "text"}), "sub-paragraphs" or "context"; "multichoice_options" are put behind the question. The first
contexts stand in the prompt, the next ones are for a model's neighbor encoder (data.neighbors contexts).

Example:
  megatron-grit build-qa --input squad/train.json --output-prefix data/squad --tokenizer model/ --task squad1.1
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from megatron_grit.cli.main import command
from megatron_grit.config.knob import knob
from megatron_grit.data.qa.options import QaTraining


@dataclass(kw_only=True)
class BuildQaOptions(QaTraining):
    """What is read, and what is written."""

    input: str = knob(path=True)
    """JSON or JSONL file of questions."""
    output_prefix: str = knob(path=True)
    """PREFIX.bin, .idx, .json and PREFIX_contexts.* are written."""


def run(options: BuildQaOptions) -> None:
    """Build and print what was made."""
    from megatron_grit.data.qa.builder import build_qa, describe_counts

    print(describe_counts(options.output_prefix, build_qa(options.input, options.output_prefix, options)))


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and build. Returns the exit status."""
    return command(BuildQaOptions, run, argv, prog="megatron-grit build-qa", about=__doc__)


if __name__ == "__main__":
    sys.exit(main())
