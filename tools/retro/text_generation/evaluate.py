"""Score answers with references: exact match, F1 of words and, with --rouge, ROUGE.

The same as ``megatron-grit evaluate qa``; --help explains.
"""

from __future__ import annotations

import sys

from megatron_grit.cli.evaluation.evaluate_qa import main

if __name__ == "__main__":
    sys.exit(main(prog="evaluate"))
