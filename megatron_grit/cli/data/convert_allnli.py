"""Turn AllNLI into JSONL for build-grit: premises with their entailments and contradictions, in both directions.

Example:
  megatron-grit convert-allnli --input AllNLI.tsv.gz --output nli.jsonl
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from megatron_grit.cli.main import command
from megatron_grit.config.knob import knob
from megatron_grit.config.options import AllNliChoice


@dataclass(kw_only=True)
class AllNliOptions(AllNliChoice):
    """AllNLI to JSONL."""

    input: str = knob(path=True)
    """AllNLI.tsv with its header, or .jsonl of anchor, positive, negative; or .gz."""
    output: str = knob(path=True)
    """JSONL file to write."""


def run(options: AllNliOptions) -> None:
    """Convert and print the count."""
    from megatron_grit.data.builders.sources.allnli import convert_allnli

    count = convert_allnli(options.input, options.output, split=options.split, seed=options.seed, progress=True)
    print(f"{options.output}: {count} records")


def main(argv: list[str] | None = None, prog: str = "megatron-grit convert-allnli") -> int:
    """Parse the command line and convert. Returns the exit status."""
    return command(AllNliOptions, run, argv, prog=prog, about=__doc__)


if __name__ == "__main__":
    sys.exit(main())
