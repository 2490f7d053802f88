"""Write report.md, report.json and loss.png from two evaluations and the metrics of the run between them.

The same as ``megatron-grit report``; --help explains.
"""

from __future__ import annotations

import sys

from megatron_grit.cli.report import main

if __name__ == "__main__":
    sys.exit(main(prog="report"))
