"""Turn AllNLI into JSONL for build_grit.py: premises with their entailments and contradictions, in both directions.

The same as ``megatron-grit convert-allnli``; --help explains.
"""

from __future__ import annotations

import sys

from megatron_grit.cli.data.convert_allnli import main

if __name__ == "__main__":
    sys.exit(main(prog="convert_allnli"))
