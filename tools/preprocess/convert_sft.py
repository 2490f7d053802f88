"""Turn a published instruction data set into JSONL for build_sft.py.

The same as ``megatron-grit convert-sft``; --help explains.
"""

from __future__ import annotations

import sys

from megatron_grit.cli.data.convert_sft import main

if __name__ == "__main__":
    sys.exit(main(prog="convert_sft"))
