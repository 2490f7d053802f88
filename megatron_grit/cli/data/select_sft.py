"""Take a part of instruction data: without duplicates, nearest to a ratio of instruction and answer, or of each source.

Example:
  megatron-grit select-sft --input data/tulu.jsonl --fraction 0.1 --output data/tulu_tenth.jsonl
"""

from __future__ import annotations

import sys

from megatron_grit.cli.main import command
from megatron_grit.data.builders.options import SftSelection


def run(options: SftSelection) -> None:
    """Run and print."""
    from megatron_grit.data.builders.selection import select_sft

    print(f"{options.output}: {select_sft(options, progress=True).summary()}")


def main(argv: list[str] | None = None, prog: str = "megatron-grit select-sft") -> int:
    """Parse the command line and run. Returns the exit status."""
    return command(SftSelection, run, argv, prog=prog, about=__doc__)


if __name__ == "__main__":
    sys.exit(main())
