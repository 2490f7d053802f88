"""Turn AllNLI into JSONL for build_grit.py: premises with their entailments and contradictions, in both directions.

Example:
  python tools/preprocess/convert_allnli.py --input AllNLI.tsv.gz --output nli.jsonl
"""

from __future__ import annotations

import argparse
import sys

from megatron_grit.data.builders.sources.allnli import convert_allnli
from megatron_grit.errors import EXIT_STATUS, GritError


def main() -> int:
    """Parse the command line and convert. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--input", required=True, help="AllNLI.tsv with its header, or .jsonl of anchor, positive, negative; or .gz"
    )
    parser.add_argument("--output", required=True, help="JSONL file to write")
    parser.add_argument("--split", default="train", help="rows of the table that are taken (default: train)")
    parser.add_argument("--seed", type=int, default=42, help="of the choice of entailments (default: 42)")
    arguments = parser.parse_args()
    try:
        count = convert_allnli(
            arguments.input, arguments.output, split=arguments.split, seed=arguments.seed, progress=True
        )
    except (GritError, OSError) as error:
        print(f"convert_allnli: error: {error}", file=sys.stderr)
        return EXIT_STATUS
    print(f"{arguments.output}: {count} records")
    return 0


if __name__ == "__main__":
    sys.exit(main())
