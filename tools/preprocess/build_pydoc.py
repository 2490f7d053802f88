"""Write the Python documentation corpus of the quickstart: four JSONL files for build_grit.py and evaluation.

Example:
    python tools/preprocess/build_pydoc.py --output-dir corpus
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_grit.data.builders.sources.pydoc import write_corpus
from megatron_grit.errors import EXIT_STATUS, GritError


def main() -> int:
    """Parse the command line and build. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, required=True, help="folder for the four .jsonl files")
    arguments = parser.parse_args()
    try:
        counts = write_corpus(arguments.output_dir)
    except (GritError, OSError) as error:
        print(f"build_pydoc: error: {error}", file=sys.stderr)
        return EXIT_STATUS
    for name, count in counts.items():
        print(f"{name:20s} {count:6d}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
