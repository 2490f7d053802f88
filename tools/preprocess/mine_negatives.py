"""Mine hard negatives for embedding records: passages that a model ranks high and that are most likely not relevant.

The input is JSONL as build_grit.py reads it; so is the output, with the other keys of each record but neg_*. A report
beside the output, mined.report.json for mined.jsonl, says what was left out and why.

Example:
  python tools/preprocess/mine_negatives.py --input pairs.jsonl --output mined.jsonl --embedder all-MiniLM-L6-v2 \\
      --ranks 10-100 --max-fraction 0.95
  python tools/preprocess/mine_negatives.py --input pairs.jsonl --output mined.jsonl --embedder runs/mine \\
      --corpus corpus.jsonl --teacher big-embedder --cross-encoder ms-marco-MiniLM-L-6-v2
  python tools/preprocess/mine_negatives.py --input pairs.jsonl --output mined.jsonl --project-dir db
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from megatron_grit.cli.main import guarded
from megatron_grit.errors import ConfigError


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--input", type=Path, nargs="+", required=True, help="JSONL of embedding records")
    add("--output", type=Path, required=True, help="JSONL to write; .jsonl.gz is compressed")
    add("--embedder", help="directory of a Hugging Face encoder or of one of our checkpoints")
    add("--corpus", type=Path, nargs="+", default=[], help="JSONL of passages (default: those of the input)")
    add("--project-dir", type=Path, help="retrieval database whose chunks are the passages; its embedder and index")
    add("--version", type=int, help="which state of it (default: that of its config.json, or the newest)")
    add("--num-negatives", type=int, default=7, help="of a record, at most")
    add("--min-negatives", type=int, default=1, help="records with fewer are left out")
    add("--ranks", default="10-100", help="first and last rank of candidates (default: 10-100)")
    add("--margin", type=float, help="a negative scores at least so much below the worst positive")
    add("--max-fraction", type=float, help="a negative scores at most this share of the worst positive, such as 0.95")
    add("--teacher", help="directory of a better embedder, which must score negatives low")
    add("--teacher-gap", type=float, default=0.05, help="by so much below the worst positive")
    add("--cross-encoder", type=Path, help="directory of a cross-encoder, or JSONL of query, passage, score")
    add("--cross-margin", type=float, default=3.0, help="by so much below the worst positive")
    add("--sampling", choices=("random", "top"), default="random", help="which of those that are left")
    add(
        "--keep-negatives",
        action="store_true",
        help="keep the negatives that records have, in front; a positive among them is left out",
    )
    add("--seed", type=int, default=0, help="of the sampling")
    add("--query-instruction", default="", help="what the embedders embed queries for")
    add("--max-length", type=int, default=256, help="tokens to which texts are cut")
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="of the embedders")
    add("--batch-tokens", type=int, default=8192, help="tokens of a forward pass")
    add("--index", default="auto", help="faiss factory string (default: chosen from the number of passages)")
    add("--index-memory-gb", type=float, default=16.0, help="memory for the index")
    add("--block-size", type=int, default=10_000, help="passages and records of a block")
    return parser.parse_args()


def main() -> int:
    """Parse the command line and mine. Returns the exit status."""
    return guarded(_run, "mine_negatives")


def _run() -> None:
    values = vars(_arguments())
    ranks = re.fullmatch("([0-9]{1,18})-([0-9]{1,18})", values["ranks"])
    if ranks is None:
        raise ConfigError(f"--ranks {values['ranks']!r} is no range; give FIRST-LAST, such as 10-100")
    from megatron_grit.retrieval.mining.mine import mine_negatives, report_lines
    from megatron_grit.retrieval.mining.options import MineOptions
    from megatron_grit.retrieval.work import worker

    with worker() as this:
        report = mine_negatives(MineOptions(**values | {"ranks": (int(ranks[1]), int(ranks[2]))}), this)
    if this.is_first:
        print("\n".join(report_lines(report)))


if __name__ == "__main__":
    raise SystemExit(main())
