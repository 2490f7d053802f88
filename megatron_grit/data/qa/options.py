"""Options of questions: how they are asked, trained and read. Light to import, for command lines."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_grit.config.knob import Checked, knob
from megatron_grit.config.locate import load_yaml
from megatron_grit.errors import ConfigError

PROMPTS_FILE = Path(__file__).with_name("prompts.yaml")


@dataclass(kw_only=True)
class PromptOptions(Checked):
    """How a question is asked."""

    task: str = knob("", text=True)
    """Name of the data set, which says what kind of answer is asked for; one that prompts.yaml does not know, and no
    name, asks for a full one."""
    prompt_template: str = "retro"
    """Of prompts.yaml: retro, short for base models, or 1 to 7."""
    ft_neighbours: int = knob(1, at_least=0)
    """Contexts that stand in the prompt."""
    retrieved: bool = True
    """Take the retrieved contexts (ctxs) of a question that has some, in place of its own."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prompt_template not in (known := load_prompts()["templates"]):
            raise ConfigError(
                f"prompt_template {self.prompt_template} is none of prompts.yaml; it has {', '.join(known)}"
            )


@dataclass(kw_only=True)
class EncoderContexts(Checked):
    """Which contexts of a question a model's neighbor encoder reads."""

    encoder_neighbours: int = knob(2, at_least=0)
    """Contexts that the neighbor encoder reads: those after the ft_neighbours in the prompt."""
    reuse_top: bool = False
    """Let the encoder read the best contexts, also where they stand in the prompt."""


@functools.cache
def load_prompts() -> Mapping[str, Any]:
    """What prompts.yaml says."""
    return load_yaml(PROMPTS_FILE.read_bytes())


@dataclass(kw_only=True)
class QaTraining(EncoderContexts, PromptOptions):
    """How questions become records to train on."""

    tokenizer: str = knob(path=True)
    """SentencePiece .model, tokenizer.json, or their folder."""
    max_len: int = knob(2048, at_least=2)
    """Longest record in tokens; contexts in the prompt are cut where it is longer."""
    neighbour_len: int = knob(128, at_least=1)
    """Longest context for the encoder in tokens: retrieved_chunks x chunk_length of the model."""
    longform: bool = False
    """Train longform_answer where a question has one."""
    no_answer: str | None = knob(None, text=True)
    """Text that is trained as the answer of a question without one. null: such a question is not fit."""
    on_filtered: Literal["drop", "stop"] = "drop"
    """What to do at a question that is not fit: without an answer, or too long."""
    overwrite: bool = False
    """Replace the files of an earlier build."""
