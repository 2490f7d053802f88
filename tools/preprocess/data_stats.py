"""Tell what instruction data is like.

The same as ``megatron-grit data-stats``; --help explains.
"""

from __future__ import annotations

import sys

from megatron_grit.cli.data.data_stats import main

if __name__ == "__main__":
    sys.exit(main(prog="data_stats"))
