"""Answer a prompt with a trained model.

Example:
    megatron-grit generate --checkpoint runs/grit --prompt "What does json.dumps(obj) do?" --max-new-tokens 64
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from megatron_grit.cli.main import command
from megatron_grit.config.knob import knob
from megatron_grit.config.options import ModelOptions


@dataclass(kw_only=True)
class GenerateOptions(ModelOptions):
    """What is answered, and how."""

    prompt: str = knob()
    """What the user says."""
    max_new_tokens: int = knob(64, at_least=1)
    """Longest answer in tokens."""
    temperature: float = knob(0.0, at_least=0)
    """0: the likeliest token each time. Above: sampled, the more freely the higher it is."""
    seed: int = knob(0, at_least=0)
    """Seed of the sampling."""


def run(options: GenerateOptions) -> None:
    """Generate and print."""
    from megatron_grit.inference.model import GritModel

    settings = vars(options).copy()
    model = GritModel.load(settings.pop("checkpoint"), device=settings.pop("device"))
    print(model.generate(settings.pop("prompt"), **settings))


def main(argv: list[str] | None = None) -> int:
    """Parse the command line, generate and print. Returns the exit status."""
    return command(GenerateOptions, run, argv, prog="megatron-grit generate", about=__doc__)


if __name__ == "__main__":
    sys.exit(main())
