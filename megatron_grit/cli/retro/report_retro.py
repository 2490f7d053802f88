"""Write report.md, report.json and plots: a decoder with and without neighbors, and answers to questions.

Example:
    megatron-grit report-retro --gpt runs/gpt --gpt-by-overlap runs/gpt_by_overlap --retro runs/retro \\
        --retro-shuffled runs/retro_shuffled --scores scores.json --timings timings.tsv --output-dir out
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from megatron_grit.cli.main import command
from megatron_grit.config.knob import knob


@dataclass(kw_only=True)
class RetroReportOptions:
    """What is told of the runs. All of them have data.valid."""

    gpt: str = knob(path=True)
    """Output directory of the run without neighbors."""
    gpt_by_overlap: str = knob(path=True)
    """Output directory of the run that measured its weights by overlap, with --training.skip_train and
    --model.retro.gate null."""
    retro: str = knob(path=True)
    """Output directory of the run with neighbors."""
    retro_shuffled: str = knob(path=True)
    """Output directory of the run with --data.retro_shuffle."""
    scores: str = knob(path=True)
    """megatron-grit evaluate qa of the answers."""
    timings: str = knob(path=True)
    """Lines of stage, tab, seconds; the stage setup is kept apart."""
    samples: str | None = knob(None, path=True)
    """Text to show at the end of report.md."""
    output_dir: str = knob(path=True)
    """Folder of the report."""


def run(options: RetroReportOptions) -> None:
    """Write and print."""
    from megatron_grit.evaluation.report_retro import write_retro_report

    print(write_retro_report(**vars(options)))


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and write. Returns the exit status."""
    return command(RetroReportOptions, run, argv, prog="megatron-grit report-retro", about=__doc__)


if __name__ == "__main__":
    sys.exit(main())
