"""Mine hard negatives for embedding records: passages that a model ranks high and that are most likely not relevant.

The input is JSONL as build-grit reads it; so is the output, with the other keys of each record but neg_*. A report
beside the output, mined.report.json for mined.jsonl, says what was left out and why.

Example:
  megatron-grit mine-negatives --input pairs.jsonl --output mined.jsonl --embedder all-MiniLM-L6-v2 \\
      --ranks 10-100 --max-fraction 0.95
  megatron-grit mine-negatives --input pairs.jsonl --output mined.jsonl --embedder runs/mine \\
      --corpus corpus.jsonl --teacher big-embedder --cross-encoder ms-marco-MiniLM-L-6-v2
  megatron-grit mine-negatives --input pairs.jsonl --output mined.jsonl --project-dir db
"""

from __future__ import annotations

import sys

from megatron_grit.cli.main import command
from megatron_grit.retrieval.mining.options import MineOptions


def run(options: MineOptions) -> None:
    """Mine, in one process or several, and print the report."""
    from megatron_grit.retrieval.mining.mine import mine_negatives
    from megatron_grit.retrieval.mining.output import report_lines
    from megatron_grit.retrieval.work import worker

    with worker() as this:
        report = mine_negatives(options, this)
    if this.is_first:
        print("\n".join(report_lines(report)))


def main(argv: list[str] | None = None, prog: str = "megatron-grit mine-negatives") -> int:
    """Parse the command line and mine. Returns the exit status."""
    return command(MineOptions, run, argv, prog=prog, about=__doc__, resumes=True)


if __name__ == "__main__":
    sys.exit(main())
