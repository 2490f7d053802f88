"""Show what an indexed file holds: its metadata and some records, span by span, with what each span is used for.

The same as ``megatron-grit inspect-indexed``; --help explains.
"""

from __future__ import annotations

import sys

from megatron_grit.cli.data.inspect_indexed import main

if __name__ == "__main__":
    sys.exit(main(prog="inspect_indexed"))
