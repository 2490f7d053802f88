"""Show what a retrieval database holds: counts, versions, index and recall; chunks, documents, neighbors; or search it.

The same as ``megatron-grit inspect-db``; --help explains.
"""

from __future__ import annotations

import sys

from megatron_grit.cli.retro.inspect_db import main

if __name__ == "__main__":
    sys.exit(main(prog="inspect_db"))
