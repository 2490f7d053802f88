"""Hand on a tuned model as its difference from a public base model, and get it back bit for bit.

The same as ``megatron-grit weight-diff``; --help explains.
"""

from __future__ import annotations

import sys

from megatron_grit.cli.weight_diff import main

if __name__ == "__main__":
    sys.exit(main(prog="weight_diff"))
