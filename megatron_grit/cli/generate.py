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
    system: str | None = None
    """A system message before it, for the template to place."""
    chat_template: str | None = knob(None, path=True)
    """In which the prompt is written: tulu, gritlm, zephyr, llama2, chatml, tokenizer or your own .yaml file. null: the
    checkpoint's."""
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
    messages = [{"role": "user", "content": settings.pop("prompt")}]
    if (system := settings.pop("system")) is not None:
        messages.insert(0, {"role": "system", "content": system})
    load = {name: settings.pop(name) for name in ("device", "chat_template")}
    model = GritModel.load(settings.pop("checkpoint"), **load)
    print(model.generate(messages, **settings))


def main(argv: list[str] | None = None) -> int:
    """Parse the command line, generate and print. Returns the exit status."""
    return command(GenerateOptions, run, argv, prog="megatron-grit generate", about=__doc__)


if __name__ == "__main__":
    sys.exit(main())
