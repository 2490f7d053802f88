"""Hand on a tuned model as its difference from a public base model, and get it back bit for bit.

Examples:
    python tools/weight_diff.py make    --base Llama-2-7b-hf --tuned exports/tuned --diff exports/tuned_diff
    python tools/weight_diff.py recover --base Llama-2-7b-hf --diff tuned_diff --tuned tuned
    python tools/weight_diff.py verify  --base Llama-2-7b-hf --diff tuned_diff

make reads two Hugging Face directories with safetensors and writes a third. recover needs the very base that make had:
it is compared tensor by tensor before anything is written. verify recovers without writing, and with --tuned compares
that directory as well. All three need memory for twice the largest tensor. make and recover resume when they are killed
and called again.
"""

from __future__ import annotations

import argparse
import sys

from megatron_grit.cli.main import guarded
from megatron_grit.convert import weight_diff


def main() -> int:
    """Parse the command line and do it. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb, summary, written in (
        ("make", "write the difference of --tuned from --base", "diff"),
        ("recover", "write --tuned again from --base and --diff", "tuned"),
        ("verify", "check that --base and --diff give the tuned model; nothing is written", None),
    ):
        options = verbs.add_parser(verb, help=summary, description=summary)
        options.add_argument("--base", required=True, help="directory of the public model")
        for name, text in (("tuned", "directory of the tuned model"), ("diff", "directory of the difference")):
            needed = not (verb == "verify" and name == "tuned")
            options.add_argument(f"--{name}", required=needed, help=text + " (written)" * (name == written))
    arguments = parser.parse_args()
    return guarded(lambda: _run(arguments), "weight_diff")


def _run(arguments: argparse.Namespace) -> None:
    base, diff, tuned = arguments.base, arguments.diff, arguments.tuned
    if arguments.verb == "make":
        print(weight_diff.make_diff(base, tuned, diff))
    elif arguments.verb == "recover":
        print(weight_diff.recover(base, diff, tuned))
    else:
        weight_diff.verify(base, diff, tuned)
        print(f"{diff}: gives the tuned model" + (f", which is {tuned}" if tuned else ""))


if __name__ == "__main__":
    sys.exit(main())
