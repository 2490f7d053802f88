"""Tokenise JSONL records into an indexed file that GRIT training reads.

Each line is one record; its format is found for each line:

  {"query": "text", "pos": ["text", ...], "neg": ["text", ...]}         embedding, plain
  {"query": ["instruction", "text"], "pos": [["", "text"]], "neg": []}  embedding, with instructions
  {"text": "text"}                                                      generation, plain
  {"text": ["user", "assistant", "user", "assistant"]}                  generation, conversation
  {"messages": [{"role": "user", "content": "text"}, ...]}              the same, with system messages
  {"prompt": "text", "completion": "text"}                              generation, without a template

Embedding and generation go into separate files. Records with an empty text, or with an instruction that leaves no
room for the text, are dropped, counted and listed in PREFIX.rejected.jsonl. The same command after a kill goes on where
it was.

Example:
  python tools/preprocess/build_grit.py --input pairs.jsonl --output-prefix data/pairs --tokenizer tokenizer.model
"""

from __future__ import annotations

import argparse
import sys

from megatron_grit.data.build.build_flags import add_build_flags, build_from_flags
from megatron_grit.errors import EXIT_STATUS, GritError
from megatron_grit.parallel.logs import configure_logging


def main() -> int:
    """Parse the command line and build. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_build_flags(parser, template="gritlm", embeds=True)
    arguments = parser.parse_args()
    configure_logging()
    try:
        report = build_from_flags(arguments, description="build_grit")
    except (GritError, OSError) as error:
        print(f"build_grit: error: {error}", file=sys.stderr)
        return EXIT_STATUS
    except KeyboardInterrupt:
        print("build_grit: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    print("\n".join(report.lines()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
