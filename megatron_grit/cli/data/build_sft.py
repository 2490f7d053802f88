"""Tokenise instruction data into an indexed file for supervised fine-tuning: answers are supervised, all else is not.

Each line is one record; its format is found for each line:

  {"messages": [{"role": "user", "content": "text"}, ...]}              conversation; system messages are optional
  {"conversations": [{"from": "human", "value": "text"}, ...]}          conversation, as of ShareGPT
  {"prompt": "text", "completion": "text"}                              without a template; the completion is supervised
  {"text": ["user", "assistant", "user", "assistant"]}                  conversation
  {"text": "text"}                                                      plain text, all of it supervised

Every answer is supervised with the token that ends its turn. Dropped records are counted and listed in
PREFIX.rejected.jsonl. After a kill the same command resumes.

Example:
  megatron-grit build-sft --input tulu.jsonl --output-prefix data/tulu --tokenizer model/ --template tulu
"""

from __future__ import annotations

import sys

from megatron_grit.cli.data.build_grit import run
from megatron_grit.cli.main import command
from megatron_grit.data.builders.options import RecordOptions


def main(argv: list[str] | None = None, prog: str = "megatron-grit build-sft") -> int:
    """Parse the command line and build. Returns the exit status."""
    return command(RecordOptions, run, argv, prog=prog, about=__doc__, resumes=True)


if __name__ == "__main__":
    sys.exit(main())
