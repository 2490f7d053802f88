"""Tokenise instruction data into an indexed file for supervised fine-tuning: answers are supervised, all else is not.

Each line is one record; its format is found for each line:

  {"messages": [{"role": "user", "content": "text"}, ...]}              conversation; system messages are optional
  {"prompt": "text", "completion": "text"}                              without a template; the completion is supervised
  {"text": ["user", "assistant", "user", "assistant"]}                  conversation
  {"text": "text"}                                                      plain text, all of it supervised

Every answer is supervised with the token that ends its turn. Dropped records are counted and listed in
PREFIX.rejected.jsonl. The same command after a kill goes on where it was.

Example:
  python tools/preprocess/build_sft.py --input tulu.jsonl --output-prefix data/tulu --tokenizer model/ --template tulu
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
    add_build_flags(parser, template="tulu", embeds=False)
    arguments = parser.parse_args()
    configure_logging()
    try:
        report = build_from_flags(arguments, description="build_sft")
    except (GritError, OSError) as error:
        print(f"build_sft: error: {error}", file=sys.stderr)
        return EXIT_STATUS
    except KeyboardInterrupt:
        print("build_sft: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    print("\n".join(report.lines()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
