"""Embed lines of text with a trained model.

Example:
    megatron-grit encode --checkpoint runs/grit --input queries.txt --output queries.npy --instruction "Find the answer"
"""

from __future__ import annotations

import argparse
import sys

from megatron_grit.cli.main import guarded
from megatron_grit.inference.text_files import encode_file


def main(argv: list[str] | None = None) -> int:
    """Parse the command line, embed and save. Returns the exit status."""
    parser = argparse.ArgumentParser(
        "megatron-grit encode", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", required=True, help="checkpoint directory, or a run's output directory")
    parser.add_argument("--input", required=True, help="UTF-8 file with one text a line; - reads standard input")
    parser.add_argument("--output", required=True, help=".npy file: float32 [lines, embedding size]")
    parser.add_argument("--instruction", default="", help="attended before each text, not pooled (default: none)")
    parser.add_argument("--side", choices=("query", "passage"), help="for a model that tells queries from passages")
    parser.add_argument("--max-length", type=int, default=512, help="tokens of a text that are read (default: 512)")
    parser.add_argument("--batch-tokens", type=int, default=8192, help="tokens embedded at a time (default: 8192)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    return guarded(lambda: _run(parser.parse_args(argv)), "megatron-grit encode")


def _run(arguments: argparse.Namespace) -> None:
    embeddings = encode_file(
        arguments.checkpoint,
        arguments.input,
        arguments.output,
        instruction=arguments.instruction,
        side=arguments.side,
        max_length=arguments.max_length,
        batch_tokens=arguments.batch_tokens,
        device=arguments.device,
    )
    num_texts, size = embeddings.shape
    print(f"{arguments.output}: {num_texts} embeddings of size {size}")


if __name__ == "__main__":
    sys.exit(main())
