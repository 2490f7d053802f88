"""Collect every figure of several models into one table: report.md, report.json, figures.png and loss.png.

A RUN is the output directory of a run (its last metrics, its evaluations inside the run, its best checkpoint), a folder
of results, or one file of them. Results are what the verbs "evaluate", "evaluate qa", "evaluate loss" and "evaluate
answers" write, and files of lm-eval and mteb, in folders of any depth. A figure that is in two files is refused, but
for lm-eval's: of the results_TIME.json of one folder the newest that has the task counts.

Example:
    megatron-grit report runs/base runs/sft results/lm_eval --output-dir out

With --before, --after, --metrics and --timings in place of RUN, the report of one run: figures before and after it.

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
    """What is told."""

    runs: list[str] = knob([], positional=True, flag="run", path=True)
    """Models: output directories of runs, folders or files of results."""
    before: str | None = knob(None, path=True)
    """megatron-grit evaluate of the untrained model."""
    after: str | None = knob(None, path=True)
    """megatron-grit evaluate of the trained model."""
    metrics: str | None = knob(None, path=True)
    """metrics.jsonl of the run."""
    timings: str | None = knob(None, path=True)
    """Lines of stage, tab, seconds; the stage setup is kept apart."""
    samples: str | None = knob(None, path=True)
    """Text to show at the end of report.md."""
    output_dir: str = knob(path=True)
    """Folder of the report."""


def run(options: ReportOptions) -> None:
    """Write and print."""
    from megatron_grit.evaluation.report_models import report

    others = vars(options).copy()
    print(report(others.pop("runs"), others.pop("output_dir"), others))


def main(argv: list[str] | None = None, prog: str = "megatron-grit report") -> int:
    """Parse the command line and write. Returns the exit status."""
    return command(ReportOptions, run, argv, prog=prog, about=__doc__)


if __name__ == "__main__":
    sys.exit(main())
