"""Documents in the order of their relevance to a query, as the APIs of Cohere and Jina give it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_grit.config.knob import value_problem
from megatron_grit.config.options import EmbeddingOptions, ServingLimits
from megatron_grit.config.values import shortened
from megatron_grit.errors import DataError
from megatron_grit.evaluation.ranking.options import RerankingOptions
from megatron_grit.evaluation.ranking.rerank import asked_tokens, score_asked
from megatron_grit.evaluation.tasks.task import Lengths
from megatron_grit.inference.messages import read_texts
from megatron_grit.inference.model import GritModel
from megatron_grit.serving.embed import embed
from megatron_grit.serving.fields import Json, RequestError, check_tokens, read_number, read_switch

METHODS = ("similarity", "yes_no", "query_likelihood")


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is to be ranked, and how."""

    query: str
    documents: list[str]
    top_n: int
    """How many are given."""
    with_texts: bool
    """Whether they are given with their texts."""
    method: str
    """One of :data:`METHODS`."""
    instruction: str | None
    """Of the query, where it is embedded."""


def read_request(body: Json, most_documents: int) -> Request:
    """What a body asks for.

    Raises:
        RequestError: names the field.
    """
    query = body.get("query")
    if not isinstance(query, str):
        raise RequestError(f"query must be a string, not {shortened(query)}", "query")
    method = body.get("method") or METHODS[0]
    if method not in METHODS:
        raise RequestError(f"method must be one of {', '.join(METHODS)}, not {shortened(method)}", "method")
    instruction = body.get("instruction", EmbeddingOptions.instruction)
    if (problem := value_problem(EmbeddingOptions, "instruction", instruction)) is not None:
        raise RequestError(f"instruction {problem}", "instruction")
    if "instruction" in body and method != METHODS[0]:
        raise RequestError(f"instruction is of the method similarity, not of {method}", "instruction")
    documents = _documents(body.get("documents"), most_documents)
    return Request(
        query=_text(query, "query"),
        documents=documents,
        top_n=read_number(body, "top_n", 1, 1 << 30, len(documents)),
        with_texts=read_switch(body, "return_documents"),
        method=method,
        instruction=instruction,
    )


def scores(
    model: GritModel, asked: Request, limits: ServingLimits, before_pass: Callable[[], None] | None
) -> tuple[np.ndarray, int]:
    """Score of each document, the higher the more relevant, and the tokens that were read for them.

    Raises:
        DataError: they cannot be scored.
        RequestError: these tokens are too many.
    """
    most = limits.max_request_tokens
    if asked.method != METHODS[0]:
        options = RerankingOptions(method=asked.method)  # type: ignore[arg-type]
        lengths = Lengths(max_length=limits.max_length)
        texts = asked_tokens(model, asked.query, asked.documents, options, lengths)
        num_tokens = sum(len(tokens) for tokens, _ in texts)
        check_tokens(num_tokens, most)
        return score_asked(model, texts, options, lengths.batch_tokens, before_pass), num_tokens
    ask = EmbeddingOptions(instruction=asked.instruction, side="query", max_length=limits.max_length)
    query, num_asked = embed(model, [asked.query], ask, most, before_pass)
    # Bare texts, where the query is one.
    plain = None if asked.instruction is None else ""
    read = EmbeddingOptions(instruction=plain, side="passage", max_length=limits.max_length)
    documents, num_read = embed(model, asked.documents, read, most - num_asked, before_pass)
    similar: np.ndarray = documents @ query[0]
    return similar.astype(np.float64), num_asked + num_read


def results(asked: Request, found: np.ndarray) -> list[Json]:
    """The best documents with their scores; equal ones in their order."""
    best = np.argsort(-found, kind="stable")[: asked.top_n].tolist()
    return [
        {"index": index, "relevance_score": float(found[index])}
        | ({"document": {"text": asked.documents[index]}} if asked.with_texts else {})
        for index in best
    ]


def _documents(given: Any, most: int) -> list[str]:
    """Texts, each as it is or under ``text``."""
    if not isinstance(given, list) or not given:
        raise RequestError(f"documents must be a list of texts, not {shortened(given)}", "documents")
    if len(given) > most:
        raise RequestError(f"documents holds {len(given)} texts; send at most {most} at a time", "documents")
    texts: list[str] = []
    for number, one in enumerate(given):
        text = one["text"] if isinstance(one, dict) and one.keys() == {"text"} else one
        if not isinstance(text, str):
            message = f'document {number} must be a string or {{"text": a string}}, not {shortened(one)}'
            raise RequestError(message, "documents")
        texts.append(_text(text, "documents", f"document {number}"))
    return texts


def _text(text: str, field: str, name: str | None = None) -> str:
    """A text that a tokenizer takes and that says something."""
    try:
        read_texts(text, 0, field)
    except DataError as error:
        raise RequestError(str(error).replace("text 0", name or field), field) from error
    return text
