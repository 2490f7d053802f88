"""Check an indexed file of Megatron's or datatrove's, which has no .json, and write that: then it can be trained on.

The same as ``megatron-grit adopt-indexed``; --help explains.
"""

from __future__ import annotations

import sys

from megatron_grit.cli.data.adopt_indexed import main

if __name__ == "__main__":
    sys.exit(main(prog="adopt_indexed"))
