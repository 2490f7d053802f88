"""Answer a prompt with a trained model.

Example:
    megatron-grit generate --checkpoint runs/grit --prompt "What does json.dumps(obj) do?" --max-new-tokens 64
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from megatron_grit.cli.main import command
from megatron_grit.config.checkpoint_folder import resolve_checkpoint
from megatron_grit.config.knob import knob
from megatron_grit.config.options import ModelOptions, SamplingOptions
from megatron_grit.store.logs import say_loading


@dataclass(kw_only=True)
class GenerateOptions(SamplingOptions, ModelOptions):
    """What is answered, and how."""

    prompt: str = knob(text=True)
    """What the user says."""
    system: str | None = knob(None, text=True, empty=True)
    """A system message before it, for the template to place."""
    chat_template: str | None = knob(None, path=True)
    """In which the prompt is written: tulu, gritlm, zephyr, llama2, chatml, tokenizer or your own .yaml file. null: the
    checkpoint's."""


def run(options: GenerateOptions) -> None:
    """Generate and print."""
    from megatron_grit.inference.messages import read_conversations

    messages = [{"role": "user", "content": options.prompt}]
    if options.system is not None:
        messages.insert(0, {"role": "system", "content": options.system})
    conversations, _ = read_conversations(messages)  # before the model: what cannot be answered is found at once
    path = resolve_checkpoint(options.checkpoint)
    say_loading()
    from megatron_grit.inference.model import GritModel

    model = GritModel.load(path, device=options.device, chat_template=options.chat_template)
    (answer,) = model.answer(conversations, options)
    print(answer.text)


def main(argv: list[str] | None = None) -> int:
    """Parse the command line, generate and print. Returns the exit status."""
    return command(GenerateOptions, run, argv, prog="megatron-grit generate", about=__doc__)


if __name__ == "__main__":
    sys.exit(main())
