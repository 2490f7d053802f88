"""Write report.md, report.json and loss.png from two evaluations and the metrics of the run between them.

Example:
    python tools/report.py --before before.json --after after.json --metrics run/metrics.jsonl \\
        --timings timings.tsv --output-dir out
"""

from __future__ import annotations

import argparse
import sys

from megatron_grit.cli.main import guarded
from megatron_grit.evaluation.report import write_report


def main() -> int:
    """Parse the command line and write. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", required=True, help="megatron-grit evaluate of the untrained model")
    parser.add_argument("--after", required=True, help="megatron-grit evaluate of the trained model")
    parser.add_argument("--metrics", required=True, help="metrics.jsonl of the run")
    parser.add_argument("--timings", required=True, help="lines of stage, tab, seconds; the stage setup is kept apart")
    parser.add_argument("--samples", help="text to show at the end of report.md")
    parser.add_argument("--output-dir", required=True)
    return guarded(lambda: print(write_report(**vars(parser.parse_args()))), "report")


if __name__ == "__main__":
    sys.exit(main())
