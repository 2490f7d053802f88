"""Tokenise preferences into an indexed file: two answers to one prompt of which one is preferred, or rated answers.

The same as ``megatron-grit build-preference``; --help explains.
"""

from __future__ import annotations

import sys

from megatron_grit.cli.alignment.build_preference import main

if __name__ == "__main__":
    sys.exit(main(prog="build_preference"))
