"""Take a part of instruction data.

The same as ``megatron-grit select-sft``; --help explains.
"""

from __future__ import annotations

import sys

from megatron_grit.cli.data.select_sft import main

if __name__ == "__main__":
    sys.exit(main(prog="select_sft"))
