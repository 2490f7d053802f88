"""Check an indexed file of Megatron's or datatrove's, which has no .json, and write that: then it can be trained on.

The whole pair is read: header, sizes, boundaries, and every id against the tokenizer's vocabulary. What is damaged is
refused. .bin and .idx stay as they are. datatrove writes them with its MegatronDocumentTokenizer.

Example:
  megatron-grit adopt-indexed --prefix data/corpus_text_document --tokenizer tokenizer.json
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from megatron_grit.cli.main import command
from megatron_grit.config.knob import knob


@dataclass(kw_only=True)
class AdoptOptions:
    """Which files, and what they were made with."""

    prefix: list[str] = knob(path=True)
    """Files without their extension; .bin or .idx at the end is taken off."""
    tokenizer: str = knob(path=True)
    """The tokenizer that they were made with: a file, or a folder that holds one."""
    overwrite: bool = False
    """Replace a .json that is there."""


def run(options: AdoptOptions) -> None:
    """Adopt, and print what was found."""
    from megatron_grit.data.indexed.adopt import adopt_indexed, describe_adopted
    from megatron_grit.data.text.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(options.tokenizer)
    for prefix in options.prefix:
        adopted = adopt_indexed(prefix, tokenizer, overwrite=options.overwrite, progress=True)
        print("\n".join(describe_adopted(adopted, tokenizer)))


def main(argv: list[str] | None = None, prog: str = "megatron-grit adopt-indexed") -> int:
    """Parse the command line and adopt. Returns the exit status."""
    return command(AdoptOptions, run, argv, prog=prog, about=__doc__)


if __name__ == "__main__":
    sys.exit(main())
