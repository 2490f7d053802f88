"""Turn MS MARCO with mined hard negatives into JSONL for build-grit.

A passage that a cross-encoder scores within the margin of a positive is no negative. Scores stand in the file of
negatives ({"pid": 3, "ce-score": -1.5}) or in a file of their own ({"qid": 1, "scores": {"3": -1.5}} a line).

Example:
  megatron-grit convert-msmarco --queries queries.train.tsv --corpus collection.tsv \\
      --negatives msmarco-hard-negatives.jsonl.gz --scores scores.jsonl --output msmarco.jsonl
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from megatron_grit.cli.main import command
from megatron_grit.config.knob import knob
from megatron_grit.config.options import MsMarcoNegatives


@dataclass(kw_only=True)
class MsMarcoOptions(MsMarcoNegatives):
    """MS MARCO to JSONL."""

    queries: str = knob(path=True)
    """qid<tab>text lines, plain or .gz."""
    corpus: str = knob(path=True)
    """pid<tab>text lines, plain."""
    negatives: str = knob(path=True)
    """JSONL of "qid", "pos" and "neg", plain or .gz."""
    scores: str | None = knob(None, path=True)
    """JSONL of "qid" and "scores", plain."""
    qrels: str | None = knob(None, path=True)
    """Further positives: qid 0 pid relevance."""
    output: str = knob(path=True)
    """JSONL file to write."""


def run(options: MsMarcoOptions) -> None:
    """Convert and print the counts."""
    from megatron_grit.data.builders.sources.msmarco import convert_msmarco

    counts = convert_msmarco(
        options.queries,
        options.corpus,
        options.negatives,
        options.output,
        scores_path=options.scores,
        qrels_path=options.qrels,
        margin=options.margin,
        per_system=options.per_system,
        systems=options.systems,
        progress=True,
    )
    print(f"{options.output}: {counts.summary()}")


def main(argv: list[str] | None = None, prog: str = "megatron-grit convert-msmarco") -> int:
    """Parse the command line and convert. Returns the exit status."""
    return command(MsMarcoOptions, run, argv, prog=prog, about=__doc__)


if __name__ == "__main__":
    sys.exit(main())
