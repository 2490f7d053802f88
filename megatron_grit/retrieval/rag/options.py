"""Options of retrieval-augmented answers; imports nothing that takes time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_grit.config.knob import Checked, knob
from megatron_grit.config.options import BatchSize, ModelOptions
from megatron_grit.errors import ConfigError

PROMPT = "Answer the question with the passages.\n\n{contexts}\n\nQuestion: {question}"
"""What a model is asked where nobody says otherwise."""


@dataclass(kw_only=True)
class RagBuild(BatchSize, ModelOptions):
    """A folder of documents to a database."""

    input: list[str] = knob(path=True)
    """Files, and folders that are read with those below them: .txt, .md, .html, and .jsonl, plain, .gz or .zst."""
    project_dir: str = knob(path=True)
    """Directory of the database."""
    chunk_length: int = knob(128, at_least=1)
    """Tokens of a chunk, which is what is found and read."""
    query_instruction: str = knob("", text=True)
    """What questions are embedded for."""
    text_key: str = "text"
    """Key of the text in a line of JSON; title and id are read as well."""
    workers: int | None = knob(None, at_least=1)
    """Processes that tokenise. null: one for each core."""
    overwrite: bool = False
    """Build again, of other documents or with other options."""


@dataclass(kw_only=True)
class ContextOptions(Checked):
    """What is put before a question."""

    project_dir: str = knob(path=True)
    """Database that rag build made."""
    num_contexts: int = knob(3, at_least=0, at_most=1000)
    """Passages before a question. 0: none, to see what the model says by itself."""
    mode: Literal["dense", "lexical", "hybrid"] = "dense"
    """Search by vectors, by words (BM25), or by both."""
    prompt: str = knob(PROMPT, text=True)
    """What is asked, with {contexts} and {question}."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("{contexts}", "{question}"):
            if self.prompt.count(name) != 1:
                raise ConfigError(f"prompt must hold {name} once")


@dataclass(kw_only=True)
class AnswerLength(Checked):
    """How long an answer may be."""

    max_new_tokens: int = knob(64, at_least=1)
    """Longest answer in tokens."""
