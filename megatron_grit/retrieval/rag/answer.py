"""Answers with the passages that a question finds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_grit.config.database.schema import load_project_config
from megatron_grit.config.options import SamplingOptions
from megatron_grit.data.text.records import Message
from megatron_grit.errors import ConfigError, DataError
from megatron_grit.inference.encoders.grit import GritEmbedder
from megatron_grit.inference.encoders.protocol import EmbedderOptions
from megatron_grit.inference.model import GritModel
from megatron_grit.retrieval.rag.build import read_sources
from megatron_grit.retrieval.rag.options import ContextOptions
from megatron_grit.retrieval.retriever import Retriever
from megatron_grit.training.checkpoint import resolve_checkpoint


@dataclass(frozen=True, kw_only=True)
class Context:
    """A passage that a question has found."""

    text: str
    source: str
    title: str
    score: float
    """Inner product, BM25, or sum of reciprocal ranks, as the search was made."""
    start: int
    """First token in its document."""

    def contents(self) -> dict[str, Any]:
        """As it stands in a file."""
        return vars(self).copy()


class RagModel:
    """A model with a database of its own embeddings.

    >>> rag = RagModel(GritModel.load("runs/grit"), "runs/grit", ContextOptions(project_dir="db"))
    >>> contexts = rag.search(["Who opens the file?"])[0]
    >>> print(rag.answer("Who opens the file?", contexts, SamplingOptions()))

    Args:
        model: it answers, and embeds questions.
        checkpoint: where it was loaded from.
        options: the database, and what is put before a question.

    Raises:
        ConfigError: there is no database.
        DataError: it was not made by ``rag build``, or with another model.
    """

    def __init__(self, model: GritModel, checkpoint: str | Path, options: ContextOptions) -> None:
        self.model, self.options = model, options
        folder = Path(options.project_dir)
        config = load_project_config(folder)
        if config is None:
            raise ConfigError(f"project_dir {folder}: holds no database; make one with megatron-grit rag build")
        self._documents = read_sources(folder)
        how = EmbedderOptions(
            max_length=config.embedder_max_length,
            batch_tokens=config.batch_tokens,
            query_instruction=config.query_instruction,
        )
        self.retriever = Retriever(folder, GritEmbedder(model, resolve_checkpoint(checkpoint), how))

    def search(self, questions: Sequence[str]) -> list[list[Context]]:
        """The passages of each question, the best first."""
        if not self.options.num_contexts:
            return [[] for _ in questions]
        hits = self.retriever.search(list(questions), self.options.num_contexts, mode=self.options.mode)
        found: list[list[Context]] = []
        for places, texts, scores in zip(hits.sources, hits.texts, hits.scores, strict=True):
            found.append([])
            for place, text, score in zip(places, texts, scores.tolist(), strict=False):
                document = self._documents[place.document]
                found[-1].append(
                    Context(text=text, source=document.source, title=document.title, score=score, start=place.start)
                )
        return found

    def prompt(self, question: str, contexts: Sequence[Context], max_new_tokens: int) -> list[int]:
        """Ids of what is asked. Where the model has too few positions, the last passages are cut, the question never.

        Raises:
            DataError: the question alone is too long.
        """
        room = self.model.config.model.max_position_embeddings - max_new_tokens
        texts = [context.text.strip() for context in contexts]
        while len(ids := self._asked(question, texts)) > room:
            if not texts:
                raise DataError(f"the question takes {len(ids)} tokens, and there is room for {room}; shorten it")
            tokens = self.model.tokenizer.encode(texts[-1])
            kept = self.model.tokenizer.decode(tokens[: max(0, len(tokens) - (len(ids) - room))]).strip()
            texts[-1:] = [kept] if kept and kept != texts[-1] else []
        return ids

    def stream(self, question: str, contexts: Sequence[Context], options: SamplingOptions) -> Iterator[str]:
        """The answer in pieces."""
        ids = self.prompt(question, contexts, options.max_new_tokens)
        return (part.text for part in self.model.stream_prompts([ids], options) if part.text)

    def answer(self, question: str, contexts: Sequence[Context], options: SamplingOptions) -> str:
        """The answer."""
        return "".join(self.stream(question, contexts, options))

    def _asked(self, question: str, texts: Sequence[str]) -> list[int]:
        head, _, rest = self.options.prompt.partition("{contexts}")
        numbered = "\n\n".join(f"[{number}] {text}" for number, text in enumerate(texts, 1))
        # What a passage says is not looked through for {question}.
        asked = [head.replace("{question}", question), numbered, rest.replace("{question}", question)]
        if not texts:  # without the lines that introduce passages there is only the question
            asked = [question]
        return self.model.prompt_tokens([Message("user", "".join(asked))])


def source_lines(contexts: Sequence[Context]) -> Iterator[str]:
    """A line for each passage: its number, where it is from, and its score."""
    for number, context in enumerate(contexts, 1):
        title = f" ({context.title})" if context.title else ""
        yield f"[{number}] {context.source}{title}, token {context.start}, score {context.score:.3f}"
