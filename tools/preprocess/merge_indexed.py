"""Join indexed files, one after another, into one. They have to be built alike: same kind, tokenizer and token type.

The same as ``megatron-grit merge-indexed``; --help explains.
"""

from __future__ import annotations

import sys

from megatron_grit.cli.data.merge_indexed import main

if __name__ == "__main__":
    sys.exit(main(prog="merge_indexed"))
