"""Join indexed files, one after another, into one. They have to be built alike: same kind, tokenizer and token type.

Offsets have 64 bits, so the result may hold any number of tokens. Files that Megatron wrote can be joined as well.

Example:
  megatron-grit merge-indexed --input data/part0_text_document data/part1_text_document \\
      --output-prefix data/corpus_text_document
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from megatron_grit.cli.main import command
from megatron_grit.config.knob import knob


@dataclass(kw_only=True)
class MergeOptions:
    """What is joined."""

    input: list[str] = knob(path=True)
    """Prefixes, joined in this order."""
    output_prefix: str = knob(path=True)
    """PREFIX.bin and .idx are written; .json where the inputs have one."""
    overwrite: bool = False
    """Replace the files of an earlier run."""


def run(options: MergeOptions) -> None:
    """Join and print the counts."""
    from megatron_grit.data.indexed.merge import merge_indexed
    from megatron_grit.data.indexed.reader import IndexedFile

    merge_indexed(options.input, options.output_prefix, overwrite=options.overwrite)
    merged = IndexedFile(options.output_prefix)
    print(f"{options.output_prefix}: {merged.num_documents} documents, {merged.num_sequences} sequences")


def main(argv: list[str] | None = None, prog: str = "megatron-grit merge-indexed") -> int:
    """Parse the command line and join. Returns the exit status."""
    return command(MergeOptions, run, argv, prog=prog, about=__doc__)


if __name__ == "__main__":
    sys.exit(main())
