"""Tokenise instruction data into an indexed file for supervised fine-tuning: answers are supervised, all else is not.

The same as ``megatron-grit build-sft``; --help explains.
"""

from __future__ import annotations

import sys

from megatron_grit.cli.data.build_sft import main

if __name__ == "__main__":
    sys.exit(main(prog="build_sft"))
