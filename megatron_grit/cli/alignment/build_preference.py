"""Tokenise preferences into an indexed file: two answers to one prompt of which one is preferred, or rated answers.

Each line is one record; its format is found for each line:

  {"chosen": [messages], "rejected": [messages]}              what both begin with is the prompt
  {"prompt": [messages], "chosen": [m], "rejected": [m]}      the answers may be strings too
  {"prompt": "text", "chosen": "text", "rejected": "text"}    texts, without a template
  {"messages": [messages], "label": true}                     one answer, desirable or (false) not, for KTO
  {"prompt": "text", "completion": "text", "label": false}    the same without a template

messages are [{"role": "user", "content": "text"}, ...]. Of a pair all answers from the first that differs are trained,
with the tokens that end their turns; of a rated conversation the last one. Dropped records are counted and listed in
PREFIX.rejected.jsonl. After a kill the same command resumes.

Example:
  megatron-grit build-preference --input pairs.jsonl --output-prefix data/pairs --tokenizer model/ --template tulu
"""

from __future__ import annotations

import sys

from megatron_grit.cli.data.build_grit import run
from megatron_grit.cli.main import command
from megatron_grit.data.builders.options import PreferenceOptions


def main(argv: list[str] | None = None, prog: str = "megatron-grit build-preference") -> int:
    """Parse the command line and build. Returns the exit status."""
    return command(PreferenceOptions, run, argv, prog=prog, about=__doc__, resumes=True)


if __name__ == "__main__":
    sys.exit(main())
