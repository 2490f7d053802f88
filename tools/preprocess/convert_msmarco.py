"""Turn MS MARCO with mined hard negatives into JSONL for build_grit.py.

A passage that a cross-encoder scores within the margin of a positive is no negative. Scores stand in the file of
negatives ({"pid": 3, "ce-score": -1.5}) or in a file of their own ({"qid": 1, "scores": {"3": -1.5}} a line).

Example:
  python tools/preprocess/convert_msmarco.py --queries queries.train.tsv --corpus collection.tsv \\
      --negatives msmarco-hard-negatives.jsonl.gz --scores scores.jsonl --output msmarco.jsonl
"""

from __future__ import annotations

import argparse
import sys

from megatron_grit.data.builders.sources.msmarco import convert_msmarco
from megatron_grit.errors import EXIT_STATUS, GritError


def main() -> int:
    """Parse the command line and convert. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", required=True, help="qid<tab>text lines, plain or .gz")
    parser.add_argument("--corpus", required=True, help="pid<tab>text lines, plain")
    parser.add_argument("--negatives", required=True, help='JSONL of "qid", "pos" and "neg", plain or .gz')
    parser.add_argument("--scores", help='JSONL of "qid" and "scores", plain')
    parser.add_argument("--qrels", help="further positives: qid 0 pid relevance")
    parser.add_argument("--output", required=True, help="JSONL file to write")
    parser.add_argument("--margin", type=_margin, default=3.0, help="below the worst positive, or off (default: 3.0)")
    parser.add_argument("--per-system", type=int, default=5, help="negatives of each system (default: 5)")
    parser.add_argument("--systems", nargs="*", default=[], help="whose negatives are taken (default: all)")
    arguments = parser.parse_args()
    try:
        counts = convert_msmarco(
            arguments.queries,
            arguments.corpus,
            arguments.negatives,
            arguments.output,
            scores_path=arguments.scores,
            qrels_path=arguments.qrels,
            margin=arguments.margin,
            per_system=arguments.per_system,
            systems=arguments.systems,
            progress=True,
        )
    except (GritError, OSError) as error:
        print(f"convert_msmarco: error: {error}", file=sys.stderr)
        return EXIT_STATUS
    print(
        f"{arguments.output}: {counts.kept} records with {counts.negatives} negatives; {counts.too_close} were too "
        f"close to a positive; left out {counts.without_positives} queries without positives and "
        f"{counts.without_negatives} without negatives"
    )
    return 0


def _margin(value: str) -> float | None:
    return None if value == "off" else float(value)


if __name__ == "__main__":
    sys.exit(main())
