"""Measure a reward model on pairs of answers: how often the preferred one has the higher reward.

DATA is what build-preference reads: JSONL with "chosen" and "rejected", in the template of the checkpoint.

Example:
    megatron-grit evaluate rewards --checkpoint runs/reward --data heldout_pairs.jsonl --output rewards.json
"""

from __future__ import annotations

import sys

from megatron_grit.cli.main import command
from megatron_grit.config.options import RewardEvaluation


def run(options: RewardEvaluation) -> None:
    """Evaluate and print."""
    from megatron_grit.evaluation.rewards import evaluate_rewards
    from megatron_grit.evaluation.tasks.task import format_figures

    print(format_figures(evaluate_rewards(options)))


def main(argv: list[str] | None = None) -> int:
    """Parse the command line, evaluate and print. Returns the exit status."""
    return command(RewardEvaluation, run, argv, prog="megatron-grit evaluate rewards", about=__doc__)


if __name__ == "__main__":
    sys.exit(main())
