"""Build sampled and rewarded completions into an indexed file, for training.objective rollout.

Each line is a prompt with its completions, as megatron-grit rollouts writes them:

  {"messages": [{"role": "user", "content": "2 + 2?"}], "prompt_token_ids": [1, 9, 3],
   "completions": [{"text": "4", "token_ids": [7, 2], "logprobs": [-0.1, -0.02], "reward": 1.0}, ...]}

The completions of a line are a group: a reward counts by how much it is above those of the others. Without token ids
the text is tokenised; without logprobs the run takes those of the model that it starts from.

Example:
  megatron-grit build-rollouts --input rollouts.jsonl --output-prefix data/rollouts --tokenizer model/
  megatron-grit train --checkpoint.load model/ --training.objective rollout --rollout.data '[data/rollouts]' ...
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from megatron_grit.cli.main import command
from megatron_grit.config.knob import knob
from megatron_grit.data.rollouts.options import RolloutBuild


@dataclass(kw_only=True)
class BuildRolloutsOptions(RolloutBuild):
    """What is built, and where to."""

    input: list[str] = knob(path=True)
    """JSONL files of completions, plain, .gz or .zst."""
    output_prefix: str = knob(path=True)
    """PREFIX.bin, .idx, .json, .completions.npy, .behavior.npy and .rollouts.json are written."""


def run(options: BuildRolloutsOptions) -> None:
    """Build, and say what there is."""
    from megatron_grit.data.rollouts.build import build_rollouts

    report = build_rollouts(options.input, options.output_prefix, options)
    print("\n".join(report.lines(options.output_prefix)))


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and build. Returns the exit status."""
    return command(BuildRolloutsOptions, run, argv, prog="megatron-grit build-rollouts", about=__doc__)


if __name__ == "__main__":
    sys.exit(main())
