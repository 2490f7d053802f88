"""Embed lines of text with a trained model.

Example:
    megatron-grit encode --checkpoint runs/grit --input queries.txt --output queries.npy --instruction "Find the answer"

Texts are read and vectors written a block at a time, so memory does not grow with their number. A killed run resumes
when the same command is given again.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from megatron_grit.cli.main import command
from megatron_grit.config.knob import knob
from megatron_grit.config.options import EmbeddingOptions, ModelOptions


@dataclass(kw_only=True)
class EncodeOptions(EmbeddingOptions, ModelOptions):
    """What is embedded."""

    input: str = knob(path=True)
    """UTF-8 file with one text a line, plain, .gz or .zst; - reads standard input."""
    output: str = knob(path=True)
    """.npy file: float32 [lines, embedding size]."""


def run(options: EncodeOptions) -> None:
    """Embed and save."""
    from megatron_grit.inference.text_files import encode_file

    settings = vars(options).copy()
    embeddings = encode_file(settings.pop("checkpoint"), settings.pop("input"), settings.pop("output"), **settings)
    num_texts, size = embeddings.shape
    print(f"{options.output}: {num_texts} embeddings of size {size}")


def main(argv: list[str] | None = None) -> int:
    """Parse the command line, embed and save. Returns the exit status."""
    return command(EncodeOptions, run, argv, prog="megatron-grit encode", about=__doc__, resumes=True)


if __name__ == "__main__":
    sys.exit(main())
