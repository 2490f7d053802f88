"""Train a SentencePiece tokenizer on the texts of JSONL records.

Reads the same records as build_grit.py. Characters outside the vocabulary are spelled in bytes, nothing is normalised,
and a newline is always a token of its own.

Example:
  python tools/preprocess/train_tokenizer.py --input pairs.jsonl texts.jsonl --output-prefix tokenizer --vocab-size 8192
"""

from __future__ import annotations

import argparse
import sys

from megatron_grit.data.builders.grit_builder import read_texts
from megatron_grit.data.text.tokenizer import train_sentencepiece
from megatron_grit.errors import EXIT_STATUS, GritError


def main() -> int:
    """Parse the command line and train. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", required=True, help="JSONL files, plain or .gz")
    parser.add_argument("--output-prefix", required=True, help="PREFIX.model is written")
    parser.add_argument("--vocab-size", type=int, required=True, help="pieces, 260 bytes and special tokens included")
    parser.add_argument("--model-type", choices=("bpe", "unigram"), default="bpe", help="SentencePiece's algorithm")
    arguments = parser.parse_args()
    try:
        texts = read_texts(arguments.input)
        path = train_sentencepiece(
            texts, arguments.output_prefix, arguments.vocab_size, model_type=arguments.model_type
        )
    except (GritError, OSError) as error:
        print(f"train_tokenizer: error: {error}", file=sys.stderr)
        return EXIT_STATUS
    print(f"{path}: {arguments.vocab_size} pieces")
    return 0


if __name__ == "__main__":
    sys.exit(main())
