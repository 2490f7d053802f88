"""Mix JSONL files of instruction data by a list of sources with amounts.

The same as ``megatron-grit mix-sft``; --help explains.
"""

from __future__ import annotations

import sys

from megatron_grit.cli.data.mix_sft import main

if __name__ == "__main__":
    sys.exit(main(prog="mix_sft"))
