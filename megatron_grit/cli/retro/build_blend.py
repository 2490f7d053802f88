"""Data sets of questions, blended by weights, to indexed files for supervised fine-tuning.

BLEND is a shell file with DATA_BLEND="0.7 NAME 0.3 OTHER"; it is read, not run. DATA/NAME/NAME_QA_train.json and,
where it is, NAME_QA_dev.json hold the questions of each data set (megatron-grit build-qa --help). OUTPUT/train.yaml
and valid.yaml are the blends that "megatron-grit train" takes as data.generative and data.valid. Run again, it
builds what changed.

Example:
  megatron-grit build-blend tools/retro/sft/open_inst.sh --data data/sft --output data/open_inst --tokenizer model/
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from megatron_grit.cli.main import command
from megatron_grit.config.knob import knob
from megatron_grit.data.qa.options import QaTraining


@dataclass(kw_only=True)
class BuildBlendOptions(QaTraining):
    """What is read, and what is written."""

    blend: str = knob(positional=True, path=True)
    """Shell file that sets DATA_BLEND."""
    data: str = knob(path=True)
    """Folder of the data sets."""
    output: str = knob(path=True)
    """Folder of the indexed files and the blends."""


def run(options: BuildBlendOptions) -> None:
    """Build what is not there."""
    from megatron_grit.data.qa.builder import build_blend

    build_blend(options.blend, options.data, options.output, options)


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and build. Returns the exit status."""
    return command(BuildBlendOptions, run, argv, prog="megatron-grit build-blend", about=__doc__)


if __name__ == "__main__":
    sys.exit(main())
