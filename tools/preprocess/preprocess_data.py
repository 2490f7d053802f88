"""Tokenise JSONL documents into Megatron's .bin and .idx, one pair for every JSON key.

The same as ``megatron-grit preprocess-data``; --help explains.
"""

from __future__ import annotations

import sys

from megatron_grit.cli.data.preprocess_data import main

if __name__ == "__main__":
    sys.exit(main(prog="preprocess_data"))
