"""Measure a checkpoint: retrieval and next-token loss on held-out data.

Example:
    megatron-grit evaluate --checkpoint runs/grit --retrieval heldout.jsonl --generative heldout_gen --output after.json
"""

from __future__ import annotations

import argparse
import sys

from megatron_grit.cli.main import guarded
from megatron_grit.evaluation.checkpoint import evaluate_checkpoint, format_figures


def main(argv: list[str] | None = None) -> int:
    """Parse the command line, evaluate and print. Returns the exit status."""
    parser = argparse.ArgumentParser(
        "megatron-grit evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", required=True, help="checkpoint directory, or a run's output directory")
    parser.add_argument("--retrieval", help="JSONL of query and pos records; recall@1, recall@10, nDCG@10")
    parser.add_argument("--generative", help="prefix of a generative indexed file; next-token loss")
    parser.add_argument("--output", required=True, help="JSON file for the figures and their 95%% intervals")
    parser.add_argument("--max-length", type=int, default=512, help="tokens of a text that are read (default: 512)")
    parser.add_argument("--batch-tokens", type=int, default=8192, help="tokens embedded at a time (default: 8192)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    return guarded(lambda: _run(parser.parse_args(argv)), "megatron-grit evaluate")


def _run(arguments: argparse.Namespace) -> None:
    figures = evaluate_checkpoint(
        arguments.checkpoint,
        arguments.output,
        retrieval=arguments.retrieval,
        generative=arguments.generative,
        device=arguments.device,
        max_length=arguments.max_length,
        batch_tokens=arguments.batch_tokens,
    )
    print(format_figures(figures))


if __name__ == "__main__":
    sys.exit(main())
