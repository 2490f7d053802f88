"""Build a retrieval database: chunks, embeddings, index and neighbors.

The same as ``megatron-grit build-db``; --help explains.
"""

from __future__ import annotations

import sys

from megatron_grit.cli.retro.build_db import main

if __name__ == "__main__":
    sys.exit(main(prog="build_db"))
