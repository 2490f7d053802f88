"""Hand on a tuned model as its difference from a public base model, and get it back bit for bit.

Examples:
    megatron-grit weight-diff make    --base Llama-2-7b-hf --tuned exports/tuned --diff exports/tuned_diff
    megatron-grit weight-diff recover --base Llama-2-7b-hf --diff tuned_diff --tuned tuned
    megatron-grit weight-diff verify  --base Llama-2-7b-hf --diff tuned_diff

make reads two Hugging Face directories with safetensors and writes a third. recover needs the very base that make had:
it is compared tensor by tensor before anything is written. verify recovers without writing, and with --tuned compares
that directory as well. All three need memory for twice the largest tensor. make and recover resume when they are killed
and called again.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Literal

from megatron_grit.cli.main import command
from megatron_grit.config.knob import knob
from megatron_grit.errors import ConfigError


@dataclass(kw_only=True)
class WeightDiffOptions:
    """Three directories, of which two are read."""

    action: Literal["make", "recover", "verify"] = knob(positional=True)
    """make: write --diff, the difference of --tuned from --base. recover: write --tuned again from --base and --diff.
    verify: check that --base and --diff give the tuned model; nothing is written."""
    base: str = knob(path=True)
    """Directory of the public model."""
    tuned: str | None = knob(None, path=True)
    """Directory of the tuned model. verify needs none, and compares it where it is given."""
    diff: str = knob(path=True)
    """Directory of the difference."""


def run(options: WeightDiffOptions) -> None:
    """Make, recover or verify."""
    from megatron_grit.convert import weight_diff

    base, diff, tuned = options.base, options.diff, options.tuned
    if options.action == "verify":
        weight_diff.verify(base, diff, tuned)
        print(f"{diff}: gives the tuned model" + (f", which is {tuned}" if tuned else ""))
    elif tuned is None:
        raise ConfigError(f"--tuned must be given to {options.action}")
    elif options.action == "make":
        print(weight_diff.make_diff(base, tuned, diff))
    else:
        print(weight_diff.recover(base, diff, tuned))


def main(argv: list[str] | None = None, prog: str = "megatron-grit weight-diff") -> int:
    """Parse the command line and do it. Returns the exit status."""
    return command(WeightDiffOptions, run, argv, prog=prog, about=__doc__, resumes=True)


if __name__ == "__main__":
    sys.exit(main())
