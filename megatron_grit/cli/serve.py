"""Answer requests for embeddings and text over HTTP.

Example:
    megatron-grit serve --checkpoint runs/grit --port 8000
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from megatron_grit.cli.main import command
from megatron_grit.config.checkpoint_folder import resolve_checkpoint
from megatron_grit.config.knob import knob
from megatron_grit.config.options import ModelOptions, RetroOptions, ServingLimits
from megatron_grit.store.logs import say_loading


@dataclass(kw_only=True)
class ServeOptions(RetroOptions, ServingLimits, ModelOptions):
    """Where requests are answered."""

    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = knob(8000, at_least=0, at_most=65535)
    """Port to listen on; 0 for a free one."""
    name: str | None = None
    """Of the model in responses. null: the name of the checkpoint's directory."""
    chat_template: str | None = knob(None, path=True)
    """In which conversations are written: tulu, gritlm, zephyr, llama2, chatml, tokenizer or your own .yaml file. null:
    the checkpoint's."""
    chat_date: str | None = None
    """What a template that asks for the date is told: YYYY-MM-DD, or data for the training data's. null: today's."""
    log_json: bool = False
    """Write a JSON object for each request, in place of a line of text."""
    api_key_file: str | None = knob(None, path=True)
    """File with keys, one a line, of which each request needs one: Authorization: Bearer KEY. null: that of the
    environment variable MEGATRON_GRIT_API_KEY, if it is set."""


def run(options: ServeOptions) -> None:
    """Serve until stopped."""
    resolve_checkpoint(options.checkpoint)
    say_loading()
    from megatron_grit.serving.server import serve

    serve(**vars(options))


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and serve until stopped. Returns the exit status."""
    return command(ServeOptions, run, argv, prog="megatron-grit serve", about=__doc__)


if __name__ == "__main__":
    sys.exit(main())
