"""Tokenise JSONL records into an indexed file that GRIT training reads.

Each line is one record; its format is found for each line:

  {"query": "text", "pos": ["text", ...], "neg": ["text", ...]}         embedding, plain
  {"query": ["instruction", "text"], "pos": [["", "text"]], "neg": []}  embedding, with instructions
  {"text": "text"}                                                      generation, plain
  {"text": ["user", "assistant", "user", "assistant"]}                  generation, conversation
  {"messages": [{"role": "user", "content": "text"}, ...]}              the same, with system messages
  {"prompt": "text", "completion": "text"}                              generation, without a template

Embedding and generation go into separate files. Records with an empty text, or with an instruction that leaves no
room for the text, are dropped, counted and listed in PREFIX.rejected.jsonl. After a kill the same command resumes.

Example:
  megatron-grit build-grit --input pairs.jsonl --output-prefix data/pairs --tokenizer tokenizer.model
"""

from __future__ import annotations

import sys

from megatron_grit.cli.main import command
from megatron_grit.data.builders.options import GritOptions, PreferenceOptions, RecordOptions


def run(options: RecordOptions | PreferenceOptions) -> None:
    """Build and print the report."""
    from megatron_grit.data.builders.grit_builder import build_records

    print("\n".join(build_records(options).lines()))


def main(argv: list[str] | None = None, prog: str = "megatron-grit build-grit") -> int:
    """Parse the command line and build. Returns the exit status."""
    return command(GritOptions, run, argv, prog=prog, about=__doc__, resumes=True)


if __name__ == "__main__":
    sys.exit(main())
