"""Models drawn at random from every family's config.json: import, states, gradients, a step, export, adapters.

A case is drawn from its number (tests/parity/drawn_models.py). The first that is wrong ends the run with status 1 and
the command that repeats it. With --own a case is drawn from our own options instead (tests/parity/drawn_options.py).

Example:
    python -m benchmarks.model_options --minutes 10 --seed 1000
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from megatron_grit.config.schema import ParallelConfig
from tests.parity.drawn_models import run_case
from tests.parity.drawn_options import run_own_case


def main() -> int:
    """Parse the command line and run cases. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="number of the first case (default: %(default)s)")
    parser.add_argument("--cases", type=int, help="so many at most")
    parser.add_argument("--minutes", type=float, default=10.0, help="start no case after them (default: %(default)s)")
    parser.add_argument("--keep-going", action="store_true", help="count wrong cases rather than end at the first")
    parser.add_argument("--own", action="store_true", help="draw from our own options")
    arguments = parser.parse_args()
    draw, flag = (run_own_case, " --own") if arguments.own else (run_case, "")
    from megatron_grit.parallel.launch import parallel_job

    end, done, wrong = time.monotonic() + 60 * arguments.minutes, Counter[str](), 0
    with parallel_job(ParallelConfig(device="cpu"), seed=2) as context:
        for number in range(arguments.seed, arguments.seed + (arguments.cases or 1 << 40)):
            if time.monotonic() > end:
                break
            with tempfile.TemporaryDirectory() as folder:
                try:
                    told = draw(number, Path(folder), context)
                except Exception as error:
                    print(
                        f"{error}\nrepeat: python -m benchmarks.model_options{flag} --cases 1 --seed {number}",
                        flush=True,
                    )
                    wrong += 1
                    if not arguments.keep_going:
                        return 1
                    continue
            done["refused" if ": refused, " in told else "right"] += 1
    print(f"{done['right']} right, {done['refused']} refused, {wrong} wrong")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
