"""Turn a published instruction data set into JSONL for build-sft, by a table of sources.

Sources: super_ni, cot, flan_v2, dolly, self_instruct, unnatural_instructions, stanford_alpaca, code_alpaca,
gpt4_alpaca, sharegpt, baize, oasst1, lima, wizardlm, open_orca, hard_coded, science, alpagasus_alpaca_5k,
alpagasus_dolly_9k and alpagasus_dolly_3k. Rows that are no conversation are counted by their reason.

Example:
  megatron-grit convert-sft --source dolly --input raw/dolly --output data/dolly.jsonl
"""

from __future__ import annotations

import sys

from megatron_grit.cli.main import command
from megatron_grit.data.builders.options import SftConversion


def run(options: SftConversion) -> None:
    """Convert and print the counts."""
    from megatron_grit.data.builders.sources.instructions import convert_sft

    counts = convert_sft(options, progress=True)
    print(f"{options.output}: {counts.summary()}")


def main(argv: list[str] | None = None, prog: str = "megatron-grit convert-sft") -> int:
    """Parse the command line and convert. Returns the exit status."""
    return command(SftConversion, run, argv, prog=prog, about=__doc__)


if __name__ == "__main__":
    sys.exit(main())
