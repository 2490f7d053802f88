"""Train a SentencePiece tokenizer on the texts of JSONL records.

Reads the same records as build-grit. Characters outside the vocabulary are spelled in bytes, nothing is normalised,
and a newline is always a token of its own.

Example:
  megatron-grit train-tokenizer --input pairs.jsonl texts.jsonl --output-prefix tokenizer --vocab-size 8192
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from megatron_grit.cli.main import command
from megatron_grit.config.knob import knob
from megatron_grit.config.options import TokenizerTraining


@dataclass(kw_only=True)
class TrainTokenizerOptions(TokenizerTraining):
    """What a tokenizer is trained on."""

    input: list[str] = knob(path=True)
    """JSONL files, plain or .gz."""
    output_prefix: str = knob(path=True)
    """PREFIX.model is written."""


def run(options: TrainTokenizerOptions) -> None:
    """Train."""
    from megatron_grit.data.builders.grit_builder import read_texts
    from megatron_grit.data.text.tokenizer import train_sentencepiece
    from megatron_grit.store.files import check_output, check_prefix

    check_prefix(options.output_prefix)
    check_output(f"{options.output_prefix}.model", options.input)
    texts = read_texts(options.input)
    path = train_sentencepiece(texts, options.output_prefix, options.vocab_size, model_type=options.model_type)
    print(f"{path}: {options.vocab_size} pieces")


def main(argv: list[str] | None = None, prog: str = "megatron-grit train-tokenizer") -> int:
    """Parse the command line and train. Returns the exit status."""
    return command(TrainTokenizerOptions, run, argv, prog=prog, about=__doc__)


if __name__ == "__main__":
    sys.exit(main())
