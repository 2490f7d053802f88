"""Mix JSONL files of instruction data: so many records of each, drawn by a seed, as a list or a published table says.

Example:
  megatron-grit mix-sft --mixture tulu-v2 --input data/sources --output data/tulu_v2.jsonl
  megatron-grit mix-sft --mixture dolly 1.0 lima 500 --input data/sources --output data/mixed.jsonl
"""

from __future__ import annotations

import sys

from megatron_grit.cli.main import command
from megatron_grit.data.builders.options import SftMixture


def run(options: SftMixture) -> None:
    """Mix and print the counts."""
    from megatron_grit.data.builders.sources.mixture import mix_sft

    counts = mix_sft(options, progress=True)
    print(f"{options.output}: {counts.summary()}")


def main(argv: list[str] | None = None, prog: str = "megatron-grit mix-sft") -> int:
    """Parse the command line and mix. Returns the exit status."""
    return command(SftMixture, run, argv, prog=prog, about=__doc__)


if __name__ == "__main__":
    sys.exit(main())
