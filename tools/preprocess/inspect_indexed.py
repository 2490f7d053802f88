"""Show what an indexed file holds: its metadata and some records, span by span, with what each span is used for.

supervised: label of the next-token loss. pooled: averaged into an embedding. attended: seen and nothing else. Files of
Megatron's own tools can be read as well.

Example:
  python tools/preprocess/inspect_indexed.py --prefix data/pairs --tokenizer tokenizer.model --show 3
"""

from __future__ import annotations

import argparse
import sys

from megatron_grit.data.indexed.inspection import describe_records, verify_file
from megatron_grit.data.text.tokenizer import load_tokenizer
from megatron_grit.errors import EXIT_STATUS, GritError
from megatron_grit.store.logs import configure_logging


def main() -> int:
    """Parse the command line and print. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prefix", required=True, help="the file without its extension")
    parser.add_argument("--tokenizer", help="shows text; without it token ids are shown")
    parser.add_argument("--show", type=int, default=3, help="number of records")
    parser.add_argument("--start", type=int, default=0, help="first record")
    parser.add_argument("--colour", choices=("auto", "always", "never"), default="auto", help="auto: on a terminal")
    parser.add_argument("--checksum", action="store_true", help="read all of it and compare it with its checksums")
    arguments = parser.parse_args()
    configure_logging()
    colour = sys.stdout.isatty() if arguments.colour == "auto" else arguments.colour == "always"
    try:
        tokenizer = load_tokenizer(arguments.tokenizer) if arguments.tokenizer else None
        for line in describe_records(
            arguments.prefix, tokenizer, start=arguments.start, count=arguments.show, colour=colour
        ):
            print(line)
        if arguments.checksum:
            print(verify_file(arguments.prefix))
    except (GritError, OSError) as error:
        print(f"inspect_indexed: error: {error}", file=sys.stderr)
        return EXIT_STATUS
    return 0


if __name__ == "__main__":
    sys.exit(main())
