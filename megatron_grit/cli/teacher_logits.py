"""Write a teacher's most probable next tokens for training files, once for all runs that learn from it.

Example:
    megatron-grit teacher-logits --checkpoint runs/large --input chats --output teacher --top-k 64
    megatron-grit train --config sft.yaml --loss.teacher.kind topk --loss.teacher.cache teacher

The teacher is a checkpoint of ours (megatron-grit convert makes one of a Hugging Face model) with the tokenizer of the
files. A killed run resumes with the same command.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from megatron_grit.cli.main import command
from megatron_grit.config.knob import knob
from megatron_grit.config.options import BatchSize, ModelOptions, TeacherLogits


@dataclass(kw_only=True)
class TeacherLogitsOptions(TeacherLogits, BatchSize, ModelOptions):
    """The teacher, the files, and where it is written."""

    input: list[str] = knob(path=True)
    """Prefixes of generative indexed files: all that a run trains on."""
    output: str = knob(path=True)
    """Folder of the cache, for loss.teacher.cache."""


def run(options: TeacherLogitsOptions) -> None:
    """Write, and say where."""
    from megatron_grit.inference.teacher_logits import write_teacher_logits

    settings = vars(options).copy()
    write_teacher_logits(settings.pop("checkpoint"), settings.pop("input"), settings.pop("output"), **settings)
    print(f"{options.output}: for loss.teacher.cache, with loss.teacher.temperature {options.temperature:g}")


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and write. Returns the exit status."""
    return command(TeacherLogitsOptions, run, argv, prog="megatron-grit teacher-logits", about=__doc__, resumes=True)


if __name__ == "__main__":
    sys.exit(main())
