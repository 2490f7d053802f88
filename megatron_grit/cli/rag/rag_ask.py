"""Answer a question with the passages that it finds, and say where these are from.

Example:
  megatron-grit rag ask --checkpoint runs/grit --project-dir rag --question "Who opens the file?"
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass

from megatron_grit.cli.main import command
from megatron_grit.config.checkpoint_folder import resolve_checkpoint
from megatron_grit.config.knob import knob
from megatron_grit.config.options import ModelOptions, SamplingOptions
from megatron_grit.retrieval.rag.options import AnswerLength, ContextOptions
from megatron_grit.store.logs import say_loading


@dataclass(kw_only=True)
class RagQuestion(AnswerLength, ContextOptions, ModelOptions):
    """What is asked."""

    question: str = knob(text=True)
    """The question."""
    json: bool = False
    """Print one JSON object with answer and passages, in place of text."""


def run(options: RagQuestion) -> None:
    """Search, answer, and print."""
    path = resolve_checkpoint(options.checkpoint)
    say_loading()
    from megatron_grit.inference.model import GritModel
    from megatron_grit.retrieval.rag.answer import RagModel, source_lines

    rag = RagModel(GritModel.load(path, device=options.device), path, options)
    (contexts,) = rag.search([options.question])
    sampling = SamplingOptions(max_new_tokens=options.max_new_tokens)
    if options.json:
        answer = rag.answer(options.question, contexts, sampling)
        told = {"question": options.question, "answer": answer, "contexts": [each.contents() for each in contexts]}
        print(json.dumps(told, ensure_ascii=False))
        return
    for piece in rag.stream(options.question, contexts, sampling):
        print(piece, end="", flush=True)
    print("\n\n" + "\n".join(source_lines(contexts)) if contexts else "")


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and answer. Returns the exit status."""
    return command(RagQuestion, run, argv, prog="megatron-grit rag ask", about=__doc__)


if __name__ == "__main__":
    sys.exit(main())
