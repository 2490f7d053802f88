"""Answer a prompt with a trained model.

Example:
    megatron-grit generate --checkpoint runs/grit --prompt "What does json.dumps(obj) do?" --max-new-tokens 64
    megatron-grit generate --checkpoint runs/retro --retro-project db --prompt "What does json.dumps(obj) do?"
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass

from megatron_grit.cli.main import command
from megatron_grit.config.checkpoint_folder import resolve_checkpoint
from megatron_grit.config.knob import knob
from megatron_grit.config.options import ModelOptions, RetroOptions, SamplingOptions
from megatron_grit.store.logs import say_loading


@dataclass(kw_only=True)
class GenerateOptions(RetroOptions, SamplingOptions, ModelOptions):
    """What is answered, and how."""

    prompt: str = knob(text=True)
    """What the user says."""
    system: str | None = knob(None, text=True, empty=True)
    """A system message before it, for the template to place."""
    chat_template: str | None = knob(None, path=True)
    """In which the prompt is written: tulu, gritlm, zephyr, llama2, chatml, tokenizer or your own .yaml file. null: the
    checkpoint's."""
    chat_date: str | None = None
    """What a template that asks for the date is told: YYYY-MM-DD, or data for the training data's. null: today's."""
    json: bool = False
    """Print a JSON object: text, finish_reason, tokens, and sources, what was read of retro_project; else these go to
    stderr."""


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
    from megatron_grit.inference.reading import describe_source, sources_of

    retriever = None
    if options.retro_project is not None:
        from megatron_grit.retrieval.reading import open_retriever

        retriever = open_retriever(options.retro_project, path, options.retrieve_every)
    model = GritModel.load(
        path, device=options.device, chat_template=options.chat_template, chat_date=options.chat_date
    )
    if retriever is not None:
        model.read_from(retriever, options.retrieve_every)
    (answer,) = model.answer(conversations, options)
    sources = sources_of(answer.readings)
    if options.json:
        usage = {"num_prompt_tokens": answer.num_prompt_tokens, "num_tokens": answer.num_tokens}
        print(json.dumps({"text": answer.text, "finish_reason": answer.finish_reason, **usage, "sources": sources}))
        return
    print(answer.text)
    for source in sources:
        print(f"source: {describe_source(source)}", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    """Parse the command line, generate and print. Returns the exit status."""
    return command(GenerateOptions, run, argv, prog="megatron-grit generate", about=__doc__)


if __name__ == "__main__":
    sys.exit(main())
