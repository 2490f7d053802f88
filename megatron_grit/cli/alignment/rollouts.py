"""Sample completions of prompts from an endpoint, and reward them: the data of a step of reinforcement learning.

Each line of PROMPTS is a prompt with what is right: {"messages": [{"role": "user", "content": "2 + 2?"}], "answer":
"4"}, or {"prompt": "2 + 2 =", "answer": "4"} without a template. --output gets a line for each with its completions,
their rewards, and ids and log-probabilities of their tokens; megatron-grit build-rollouts makes training data of it.
The same command resumes after a kill.

Rewards, from 0 to 1 but for the last two:
  math-verify            the completion's mathematical answer equals the right one (pip install 'megatron-grit[rl]')
  exact                  it is the right answer, but for white space around it
  contains, starts_with  it holds the right answer, or begins with it
  regex:PATTERN          PATTERN, of Python's re, is found in it
  format:think,answer    it is <think>...</think> <answer>...</answer> and nothing else
  model:PATH             any number: what a reward model says, a checkpoint of training.objective reward
  python:MODULE:FUNCTION any number: FUNCTION(completion, line), with the prompt's line as a dictionary

Example:
  megatron-grit serve --checkpoint runs/sft --port 8000 &
  megatron-grit rollouts --prompts gsm8k.jsonl --endpoint http://127.0.0.1:8000/v1 --n 8 --output rollouts.jsonl \\
      --reward math-verify --reward 0.1*format:think,answer --answer-tag answer
  megatron-grit rollouts --completions rollouts.jsonl --reward exact --output again.jsonl
"""

from __future__ import annotations

import sys

from megatron_grit.cli.main import command
from megatron_grit.inference.rollouts.options import RolloutOptions


def run(options: RolloutOptions) -> None:
    """Sample and reward, and say what there is."""
    from megatron_grit.inference.rollouts.run import write_rollouts_file

    print("\n".join(write_rollouts_file(options).lines(options.output)))


def main(argv: list[str] | None = None) -> int:
    """Parse the command line, sample and reward. Returns the exit status."""
    return command(RolloutOptions, run, argv, prog="megatron-grit rollouts", about=__doc__, resumes=True)


if __name__ == "__main__":
    sys.exit(main())
