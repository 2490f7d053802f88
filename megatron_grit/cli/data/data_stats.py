"""Tell what instruction data is like: turns, lengths by role, duplicates, and what they say of Instruction Modelling.

Example:
  megatron-grit data-stats --input data/tulu.jsonl --tokenizer model/ --plot lengths.png
"""

from __future__ import annotations

import sys

from megatron_grit.cli.main import command
from megatron_grit.data.builders.options import SftStatistics


def run(options: SftStatistics) -> None:
    """Run and print."""
    from megatron_grit.data.builders.statistics import measure_sft

    print("\n".join(measure_sft(options, progress=True).lines()))


def main(argv: list[str] | None = None, prog: str = "megatron-grit data-stats") -> int:
    """Parse the command line and run. Returns the exit status."""
    return command(SftStatistics, run, argv, prog=prog, about=__doc__)


if __name__ == "__main__":
    sys.exit(main())
