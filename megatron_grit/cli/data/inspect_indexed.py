"""Show what an indexed file holds: its metadata and some records, span by span, with what each span is used for.

supervised: label of the next-token loss. pooled: averaged into an embedding. attended: seen and nothing else. Files of
Megatron's own tools can be read as well.

Example:
  megatron-grit inspect-indexed --prefix data/pairs --tokenizer tokenizer.model --show 3
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Literal

from megatron_grit.cli.main import command
from megatron_grit.config.knob import knob
from megatron_grit.config.options import ShownRecords


@dataclass(kw_only=True)
class InspectOptions(ShownRecords):
    """Which file and how much of it."""

    prefix: str = knob(path=True)
    """The file without its extension."""
    tokenizer: str | None = knob(None, path=True)
    """Shows text. null: token ids are shown."""
    colour: Literal["auto", "always", "never"] = "auto"
    """Whether roles are told by colours. auto: on a terminal."""
    checksum: bool = False
    """Read all of it and compare it with its checksums."""


def run(options: InspectOptions) -> None:
    """Print."""
    from megatron_grit.data.indexed.inspection import describe_records, verify_file
    from megatron_grit.data.text.tokenizer import load_tokenizer

    colour = sys.stdout.isatty() if options.colour == "auto" else options.colour == "always"
    tokenizer = load_tokenizer(options.tokenizer) if options.tokenizer else None
    for line in describe_records(options.prefix, tokenizer, start=options.start, count=options.show, colour=colour):
        print(line)
    if options.checksum:
        print(verify_file(options.prefix))


def main(argv: list[str] | None = None, prog: str = "megatron-grit inspect-indexed") -> int:
    """Parse the command line and print. Returns the exit status."""
    return command(InspectOptions, run, argv, prog=prog, about=__doc__)


if __name__ == "__main__":
    sys.exit(main())
