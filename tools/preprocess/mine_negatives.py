"""Mine hard negatives for embedding records: passages that a model ranks high and that are most likely not relevant.

The same as ``megatron-grit mine-negatives``; --help explains.
"""

from __future__ import annotations

import sys

from megatron_grit.cli.data.mine_negatives import main

if __name__ == "__main__":
    sys.exit(main(prog="mine_negatives"))
