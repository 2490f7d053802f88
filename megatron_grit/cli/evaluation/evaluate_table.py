"""Compare models: the mean of each group of tasks, and the mean of the groups.

A model is a folder of results of its tasks: TASK.json of "megatron-grit evaluate" or "evaluate qa", or files of
lm-eval's. GROUPS says what counts, in YAML:

    Reading: {squad2: f1, quoref: f1}
    Closed book: {nq: em}
    Translation: {wmt14: {metric: ter, scale: 0.01}}

In a group every task weighs the same, in the mean every group. A task that is in two files is refused, but for
lm-eval's: of the results_TIME.json of one folder the newest that has the task counts.

Example:
    megatron-grit evaluate qa answers.txt test.json --output results/sft/squad2.json
    megatron-grit evaluate table --models results/base results/sft --groups groups.yaml
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from megatron_grit.cli.main import command
from megatron_grit.config.knob import knob


@dataclass(kw_only=True)
class EvaluateTableOptions:
    """What is compared."""

    models: list[str] = knob(path=True)
    """A folder of results for each model."""
    groups: str = knob(path=True)
    """YAML file of groups, their tasks and the metric of each."""
    latex: bool = False
    """Print LaTeX in place of Markdown."""
    output: str | None = knob(None, path=True)
    """JSON file for the means, and for what they are of."""


def run(options: EvaluateTableOptions) -> None:
    """Read and print."""
    from megatron_grit.evaluation.table import group_table

    print("\n".join(group_table(options.models, options.groups, options.output).lines(options.latex)))


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and compare. Returns the exit status."""
    return command(EvaluateTableOptions, run, argv, prog="megatron-grit evaluate table", about=__doc__)


if __name__ == "__main__":
    sys.exit(main())
