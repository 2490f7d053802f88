"""Tokenise JSONL records into an indexed file that GRIT training reads.

Each line is one record; its format is found for each line:

  {"query": "text", "pos": ["text", ...], "neg": ["text", ...]}         embedding, plain
  {"query": ["instruction", "text"], "pos": [["", "text"]], "neg": []}  embedding, with instructions
  {"text": "text"}                                                      generation, plain
  {"text": ["user", "assistant", "user", "assistant"]}                  generation, conversation
  {"messages": [{"role": "user", "content": "text"}, ...]}              the same

Embedding and generation go into separate files. Records with an empty text, or with an instruction that leaves no
room for the text, are dropped, counted and listed in PREFIX.rejected.jsonl.

Example:
  python tools/preprocess/build_grit.py --input pairs.jsonl --output-prefix data/pairs --tokenizer tokenizer.model
"""

from __future__ import annotations

import argparse
import sys

from megatron_grit.data.grit_builder import Limits, build_grit
from megatron_grit.errors import EXIT_STATUS, GritError
from megatron_grit.parallel.logs import configure_logging


def main() -> int:
    """Parse the command line and build. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", required=True, help="JSONL files, plain or .gz, read in this order")
    parser.add_argument("--output-prefix", required=True, help="PREFIX.bin, .idx, .json and .report.json are written")
    parser.add_argument("--tokenizer", required=True, help="SentencePiece .model, tokenizer.json, or their folder")
    parser.add_argument("--query-max-len", type=int, default=256, help="tokens of a query, template included")
    parser.add_argument("--passage-max-len", type=int, default=2048, help="tokens of a passage, template included")
    parser.add_argument("--generative-max-len", type=int, default=2048, help="tokens of a text or conversation")
    parser.add_argument("--on-error", choices=("stop", "skip"), default="stop", help="a line that is not a record")
    parser.add_argument(
        "--on-filtered", choices=("drop", "stop"), default="drop", help="an empty text, an instruction too long"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the files of an earlier build")
    arguments = parser.parse_args()
    configure_logging()
    try:
        limits = Limits(
            query=arguments.query_max_len,
            passage=arguments.passage_max_len,
            generative=arguments.generative_max_len,
        )
        report = build_grit(
            arguments.input,
            arguments.output_prefix,
            arguments.tokenizer,
            limits,
            on_error=arguments.on_error,
            on_filtered=arguments.on_filtered,
            overwrite=arguments.overwrite,
            progress=True,
        )
    except (GritError, OSError) as error:
        print(f"build_grit: error: {error}", file=sys.stderr)
        return EXIT_STATUS
    print("\n".join(report.lines()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
