"""Scores of a passage for a query by what a model generates: yes or no to whether it is relevant, or the query."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from megatron_grit.data.indexed.roles import Role
from megatron_grit.data.text.records import Message
from megatron_grit.data.text.spans import encode_units
from megatron_grit.data.text.templates import encode_chat
from megatron_grit.errors import DataError
from megatron_grit.evaluation.ranking.options import RerankingOptions
from megatron_grit.evaluation.tasks.task import Lengths

if TYPE_CHECKING:
    from megatron_grit.inference.model import GritModel

ANSWERS = ("yes", "no")
Asked = tuple[np.ndarray, np.ndarray]
"""Tokens (int [L]), and which of them are scored (bool [L])."""


def score_passages(
    model: GritModel, query: str, passages: Sequence[str], options: RerankingOptions, lengths: Lengths
) -> np.ndarray:
    """Scores of passages for one query, the higher the more relevant: float64 [n].

    Args:
        model: the model, whole in this process.
        query: what is searched for.
        passages: at least one.
        options: how.
        lengths: a passage is cut so far that what is asked has at most ``max_length`` tokens, and fits the model.

    Raises:
        DataError: the query and the prompt alone are too long, or the chat template keeps no answer apart.
    """
    return score_asked(model, asked_tokens(model, query, passages, options, lengths), options, lengths.batch_tokens)


def asked_tokens(
    model: GritModel, query: str, passages: Sequence[str], options: RerankingOptions, lengths: Lengths
) -> list[Asked]:
    """Of each passage what the model is asked: see :func:`score_passages`."""
    tokens_of = _asks_for_answer if options.method == "yes_no" else _asks_for_query
    cut = [passage[: options.passage_chars] for passage in passages]
    return tokens_of(model, query, cut, options.asked, lengths)


def score_asked(
    model: GritModel,
    asked: Sequence[Asked],
    options: RerankingOptions,
    batch_tokens: int,
    before_pass: Callable[[], object] | None = None,
) -> np.ndarray:
    """Scores of what the model is asked.

    Args:
        model: the model, whole in this process.
        asked: of :func:`asked_tokens`.
        options: of the same.
        batch_tokens: token budget of one forward pass.
        before_pass: called before each; what it raises ends the call.
    """
    from megatron_grit.inference.score import next_token_logits, score_tokens

    if options.method == "yes_no":  # the logit of yes less that of no: the logarithm of their odds
        prompts = [tokens for tokens, _ in asked]
        logits = next_token_logits(
            model.model, prompts, answer_ids(model), batch_tokens=batch_tokens, before_pass=before_pass
        )
        difference: np.ndarray = logits[:, 0].astype(np.float64) - logits[:, 1]
        return difference
    sums, _ = score_tokens(
        model.chunks,
        asked,
        group=model.model_group,
        batch_tokens=batch_tokens,
        progress=False,
        before_pass=before_pass,
    )
    return -sums


def _asks_for_answer(
    model: GritModel, query: str, passages: Sequence[str], asked: str, lengths: Lengths
) -> list[Asked]:
    def prompt_of(passage: str) -> list[int]:
        return model.prompt_tokens([Message("user", _filled(asked, passage, query))])

    prompts = [np.array(_fitted(model, prompt_of, passage, lengths.max_length)) for passage in passages]
    return [(prompt, np.zeros(len(prompt), dtype=bool)) for prompt in prompts]


def answer_ids(model: GritModel) -> list[int]:
    """The first token of each of :data:`ANSWERS`, where it stands in the checkpoint's chat template.

    Raises:
        DataError: both begin with one token.
    """
    ids = []
    for answer in ANSWERS:
        spans = encode_chat(model.tokenizer, ["?", answer], template=model.chat.bind(model.tokenizer))
        ids.append(next(tokens[0] for role, tokens in spans if role == Role.ANSWER))
    if ids[0] == ids[1]:
        raise DataError(
            "yes and no begin with the same token; use the method query_likelihood", path=model.tokenizer.path
        )
    return ids


def _asks_for_query(model: GritModel, query: str, passages: Sequence[str], asked: str, lengths: Lengths) -> list[Asked]:
    """Texts whose score is the sum of the log-probabilities of the query's tokens (SGPT-CE, arXiv 2202.08904, section
    4.1)."""
    before, _, after = asked.partition("{query}")
    tokenizer = model.tokenizer

    def parts_of(passage: str) -> list[tuple[Role, list[int]]]:
        pieces: list[tuple[Role, str | int]] = [(Role.USER, tokenizer.bos_id)]
        pieces += [(Role.USER, _filled(before, passage, "")), (Role.ANSWER, f" {query.strip()}"), (Role.USER, after)]
        table = encode_units(tokenizer, [[piece for piece in pieces if piece[1] != ""]])
        return table.spans(0)

    def tokens_of(passage: str) -> list[int]:
        return [token for _, tokens in parts_of(passage) for token in tokens]

    texts = []
    for passage in passages:
        kept = _cut(model, tokens_of, passage, lengths.max_length)
        parts = parts_of(kept)
        tokens = np.array([token for _, found in parts for token in found])
        texts.append(
            (tokens, np.repeat([role == Role.ANSWER for role, _ in parts], [len(found) for _, found in parts]))
        )
    return texts


def _filled(text: str, passage: str, query: str) -> str:
    """The prompt in one go: what a passage says is not looked through for {query}."""
    head, found, tail = text.partition("{passage}")
    parts = [head, passage, tail] if found else [head, "", ""]
    return "".join(part if place == 1 else part.replace("{query}", query) for place, part in enumerate(parts))


def _fitted(model: GritModel, tokens_of: Callable[[str], list[int]], passage: str, max_length: int) -> list[int]:
    return tokens_of(_cut(model, tokens_of, passage, max_length))


def _cut(model: GritModel, tokens_of: Callable[[str], list[int]], passage: str, max_length: int) -> str:
    """The passage without the last tokens, so that all fits."""
    limit = min(max_length, model.config.model.max_position_embeddings)
    while (excess := len(tokens_of(passage)) - limit) > 0:
        ids = model.tokenizer.encode(passage)
        if len(ids) <= excess:
            raise DataError(f"a query and the prompt alone have more than {limit} tokens; raise max_length")
        passage = model.tokenizer.decode(ids[: len(ids) - excess])
    return passage
