"""Answer a file of questions, asked as they are in training.

The output has an answer a line, in the order of the questions, for "megatron-grit evaluate qa". The first contexts of a
question stand in the prompt, the next ones are read by the neighbor encoder of a model that has one; with
--retro-project it reads what the database finds instead.

Example:
    megatron-grit generate-qa --checkpoint runs/sft --input squad/test.json --output answers.txt --task squad1.1
    megatron-grit evaluate qa answers.txt squad/test.json
"""

from __future__ import annotations

import sys

from megatron_grit.cli.main import command
from megatron_grit.evaluation.qa.options import QaGeneration


def run(options: QaGeneration) -> None:
    """Answer, write, and say how many."""
    from megatron_grit.evaluation.qa.generate import generate_answers

    print(f"{options.output}: {generate_answers(options)} answers")


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and answer. Returns the exit status."""
    return command(QaGeneration, run, argv, prog="megatron-grit generate-qa", about=__doc__, resumes=True)


if __name__ == "__main__":
    sys.exit(main())
