"""Tokenise JSONL records into an indexed file that GRIT training reads.

The same as ``megatron-grit build-grit``; --help explains.
"""

from __future__ import annotations

import sys

from megatron_grit.cli.data.build_grit import main

if __name__ == "__main__":
    sys.exit(main(prog="build_grit"))
