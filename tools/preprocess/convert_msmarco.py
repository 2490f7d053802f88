"""Turn MS MARCO with mined hard negatives into JSONL for build_grit.py.

The same as ``megatron-grit convert-msmarco``; --help explains.
"""

from __future__ import annotations

import sys

from megatron_grit.cli.data.convert_msmarco import main

if __name__ == "__main__":
    sys.exit(main(prog="convert_msmarco"))
