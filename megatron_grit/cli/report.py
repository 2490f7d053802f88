"""Write report.md, report.json and loss.png from two evaluations and the metrics of the run between them.

Example:
    megatron-grit report --before before.json --after after.json --metrics run/metrics.jsonl \\
        --timings timings.tsv --output-dir out
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from megatron_grit.cli.main import command
from megatron_grit.config.knob import knob


@dataclass(kw_only=True)
class ReportOptions:
    """What is told of a run."""

    before: str = knob(path=True)
    """megatron-grit evaluate of the untrained model."""
    after: str = knob(path=True)
    """megatron-grit evaluate of the trained model."""
    metrics: str = knob(path=True)
    """metrics.jsonl of the run."""
    timings: str = knob(path=True)
    """Lines of stage, tab, seconds; the stage setup is kept apart."""
    samples: str | None = knob(None, path=True)
    """Text to show at the end of report.md."""
    output_dir: str = knob(path=True)
    """Folder of the report."""


def run(options: ReportOptions) -> None:
    """Write and print."""
    from megatron_grit.evaluation.report import write_report

    print(write_report(**vars(options)))


def main(argv: list[str] | None = None, prog: str = "megatron-grit report") -> int:
    """Parse the command line and write. Returns the exit status."""
    return command(ReportOptions, run, argv, prog=prog, about=__doc__)


if __name__ == "__main__":
    sys.exit(main())
