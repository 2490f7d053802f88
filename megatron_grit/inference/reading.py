"""Neighbors in generation: where they change, where they come from, and what was read.

A prompt of L tokens is read in windows of a chunk's length that end at its last token and at each chunk's length before
it, as far as they are whole; a shorter prompt is one window. From there on windows end at every N-th token of the
answer and hold the last chunk's length of tokens. The neighbors of a window are read from its last token on, until the
last token of the next one. With N equal to the chunk length these are the chunks of training, counted from the prompt's
end rather than from its beginning, so that the neighbors of the prompt's last tokens are read by the first token of the
answer.
"""

from __future__ import annotations

from collections.abc import Sequence, Sized
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from megatron_grit.config.knob import value_problem
from megatron_grit.config.options import RetroOptions
from megatron_grit.config.schema import ModelConfig
from megatron_grit.config.shape import neighbor_tokens
from megatron_grit.config.values import shortened
from megatron_grit.data.rows.neighbors import Neighbors
from megatron_grit.data.text.tokenizer import Tokenizer
from megatron_grit.errors import ConfigError, DataError
from megatron_grit.inference.messages import read_texts


@dataclass(frozen=True)
class Passage:
    """A neighbor."""

    tokens: Sequence[int]
    prefix: str | None = None
    """Of the indexed file that it is from. None: it was given."""
    document: int | None = None
    start: int | None = None
    """First token of the chunk in the document."""
    stop: int | None = None
    """The one after its last."""
    metric: str | None = None
    """Of the index: l2, squared distances, of which the smallest are best, or inner_product."""
    score: float | None = None


class Window(NamedTuple):
    """The tokens that neighbors are retrieved with."""

    sequence: int
    """Number of the prompt."""
    tokens: list[int]


class NeighborSource(Protocol):
    """Where neighbors come from."""

    def find(self, windows: Sequence[Window]) -> list[list[Passage]]:
        """Neighbors of each window, at most as many as the model reads; none where there are none."""
        ...


@dataclass
class GivenNeighbors:
    """The same neighbors for every window of a sequence."""

    passages: list[list[Passage]]
    """Of each sequence."""

    def find(self, windows: Sequence[Window]) -> list[list[Passage]]:
        """Those of the window's sequence."""
        return [self.passages[window.sequence] for window in windows]


class Searches(Protocol):
    """A database: :class:`~megatron_grit.retrieval.retriever.Retriever`."""

    @property
    def metric(self) -> str:
        """Of its scores."""
        ...

    @property
    def chunk_length(self) -> int:
        """Tokens of its chunks."""
        ...

    @property
    def tokenizer(self) -> Tokenizer:
        """Of its documents."""
        ...

    def search(self, queries: Sequence[str], k: int = 10, *, length: int | None = None) -> Any:
        """Its :class:`~megatron_grit.retrieval.retriever.Hits`."""
        ...


class RetrievedNeighbors:
    """What a database finds with the text of a window.

    Args:
        retriever: the database.
        model: the shape of the model, which reads neighbors.
        tokenizer: of the model.

    Raises:
        ConfigError: it is none, or is of another tokenizer or chunk length.
    """

    def __init__(self, retriever: Searches, model: ModelConfig, tokenizer: Tokenizer) -> None:
        if not hasattr(retriever, "search"):
            raise ConfigError(
                f'what is read from must be an open database, such as Retriever("db"), not {shortened(retriever)}'
            )
        check_database(model, tokenizer, retriever.chunk_length, retriever.tokenizer)
        self._retriever, self._tokenizer = retriever, tokenizer
        self._k, self._length = model.retro.num_neighbors, neighbor_tokens(model)

    def find(self, windows: Sequence[Window]) -> list[list[Passage]]:
        """The nearest chunks with what follows them in their documents; one search for all windows."""
        texts = [self._tokenizer.decode(window.tokens) for window in windows]
        asked = [number for number, text in enumerate(texts) if text.strip()]
        found: list[list[Passage]] = [[] for _ in windows]
        if not asked:
            return found
        hits = self._retriever.search([texts[number] for number in asked], self._k, length=self._length)
        for row, number in enumerate(asked):
            for column, place in enumerate(hits.sources[row]):
                tokens = hits.tokens[row, column][hits.mask[row, column]].tolist()
                where = (place.prefix, place.document, place.start, place.stop)
                score = float(hits.scores[row, column])
                found[number].append(Passage(tokens, *where, self._retriever.metric, score))
        return found


def check_reads(model: ModelConfig) -> None:
    """
    Raises:
        ConfigError: the model reads no neighbors.
    """
    if not model.retro.num_neighbors:
        raise ConfigError(
            "neighbors are for a model that was trained with model.retro.num_neighbors, and this one was not; put "
            "their text into the prompt"
        )
    if model.retro.parity != "none":
        raise ConfigError(f"model.retro.parity {model.retro.parity} is for comparisons; it does not generate")


def check_database(model: ModelConfig, tokenizer: Tokenizer, chunk_length: int, other: Tokenizer) -> None:
    """
    Args:
        model: its shape.
        tokenizer: of the model.
        chunk_length: of the database.
        other: the database's tokenizer.

    Raises:
        ConfigError: the model cannot read the database.
    """
    check_reads(model)
    if chunk_length != model.retro.chunk_length:
        raise ConfigError(
            f"the database has chunks of {chunk_length} tokens, and the model was trained with "
            f"model.retro.chunk_length {model.retro.chunk_length}; give the database that it was trained with, or one "
            f"that is built with --chunk_length {model.retro.chunk_length}"
        )
    if tokenizer.fingerprint != other.fingerprint:
        raise ConfigError(
            f"the database was built with another tokenizer than the model's, {other.path}; give one of the model's "
            "tokenizer"
        )


def check_every(every: int | None, model: ModelConfig) -> int:
    """After how many tokens of an answer neighbors are retrieved; None: after as many as a chunk has.

    Raises:
        ConfigError: it is none of 1 to chunk_length.
    """
    if (problem := value_problem(RetroOptions, "retrieve_every", every)) is not None:
        raise ConfigError(f"retrieve_every {problem}")
    if every is not None and every > model.retro.chunk_length:
        raise ConfigError(
            f"retrieve_every must be at most the model's chunk_length {model.retro.chunk_length}, not {every}"
        )
    return every or model.retro.chunk_length


def given_neighbors(
    model: ModelConfig, tokenizer: Tokenizer, texts: Sequence[Sequence[str | Sequence[int]]]
) -> GivenNeighbors:
    """Neighbors from the caller.

    Args:
        model: the shape of the model.
        tokenizer: of the model.
        texts: for each sequence at most model.retro.num_neighbors texts or lists of token ids; of each the first
            retrieved_chunks x chunk_length tokens are read.

    Raises:
        ConfigError: the model reads none.
        DataError: there are too many, or one is empty or no text.
    """
    check_reads(model)
    k, length = model.retro.num_neighbors, neighbor_tokens(model)
    passages: list[list[Passage]] = []
    too_many = f"neighbors must be a list of at most {k} texts (model.retro.num_neighbors) for each prompt"
    for several in texts:
        if not isinstance(several, Sequence):
            raise DataError(too_many)
        if not several:
            passages.append([])
            continue
        if any(
            isinstance(text, Sized) and not (text.strip() if isinstance(text, str) else len(text)) for text in several
        ):
            raise DataError("a neighbor is empty; leave it out")
        known, single = read_texts(several, tokenizer.vocab_size, "neighbors")  # type: ignore[arg-type]
        if single or len(known) > k:
            raise DataError(too_many)
        tokens = [tokenizer.encode(text) if isinstance(text, str) else text for text in known]
        passages.append([Passage(one[:length]) for one in tokens])
    return GivenNeighbors(passages)


class Reading(NamedTuple):
    """What was read from a token on."""

    token: int
    """Of the answer, the first that was drawn with it; below 0 in the prompt."""
    passages: list[Passage]


def sources_of(readings: Sequence[Reading]) -> list[dict[str, Any]]:
    """What was read from a database, each chunk once, in the order in which it was first read: its file, document,
    tokens ``start`` to ``stop - 1``, metric and score, and the first token of the answer that was drawn with it (below
    0: of the prompt)."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for reading in readings:
        for passage in reading.passages:
            if passage.document is not None:
                source = {name: value for name, value in vars(passage).items() if name != "tokens"}
                found.setdefault((passage.prefix, passage.document, passage.start), source | {"token": reading.token})
    return list(found.values())


def describe_source(source: dict[str, Any]) -> str:
    """One of :func:`sources_of` in words: "corpus document 12, tokens 64-128, l2 0.83, read from token 0 on"."""
    since = f"from token {source['token']} on" if source["token"] >= 0 else "in the prompt"
    return (
        f"{source['prefix']} document {source['document']}, tokens {source['start']}-{source['stop']}, "
        f"{source['metric']} {source['score']:.4g}, read {since}"
    )


@dataclass
class Reader:
    """Gives each pass of generation its new neighbors.

    Args:
        source: where they come from.
        chunk_length: tokens of a window.
        every: tokens of the answer between two windows, 1 to ``chunk_length``.
        prompt_lengths: tokens of each prompt.
    """

    source: NeighborSource
    chunk_length: int
    every: int
    prompt_lengths: list[int]
    readings: list[list[Reading]] = field(init=False)
    """Of each sequence, in order."""

    def __post_init__(self) -> None:
        self.readings = [[] for _ in self.prompt_lengths]

    def read(self, sequences: Sequence[int], tokens: Sequence[Sequence[int]], lengths: Sequence[int]) -> Neighbors:
        """New neighbors of a pass.

        Args:
            sequences: number of the prompt of each segment.
            tokens: of each segment's prompt and answer so far.
            lengths: how many of them the cache holds; the others are those of the pass.

        Raises:
            DataError: a neighbor is empty, or the source fails.
        """
        windows, stops, bounds, ends, begin = [], [], [], [], 0
        for sequence, known, length in zip(sequences, tokens, lengths, strict=True):
            end = begin + len(known) - length
            for stop in self._stops(self.prompt_lengths[sequence], length, len(known)):
                start = max(0, stop - self.chunk_length)
                windows.append(Window(sequence, list(known[start:stop])))
                bounds.append((begin + start - length, begin + stop - length))
                stops.append(stop)
                ends.append(end)
            begin = end
        found = self.source.find(windows) if windows else []
        for window, stop, passages in zip(windows, stops, found, strict=True):
            self.readings[window.sequence].append(Reading(stop - self.prompt_lengths[window.sequence], passages))
        return _laid_out(bounds, ends, found)

    def _stops(self, prompt: int, first: int, last: int) -> list[int]:
        """Where windows end, above ``first`` and up to ``last``."""
        in_prompt = list(range(prompt, min(prompt, self.chunk_length) - 1, -self.chunk_length))[::-1]
        due = -(-max(first + 1 - prompt, 1) // self.every) * self.every
        return [stop for stop in in_prompt if first < stop <= last] + list(range(prompt + due, last + 1, self.every))


def _laid_out(bounds: list[tuple[int, int]], ends: list[int], found: list[list[Passage]]) -> Neighbors:
    """As a pass takes them."""
    text_of_Ck = np.full((len(found), max(map(len, found), default=0)), -1, dtype=np.int64)
    texts: list[Sequence[int]] = []
    for number, passages in enumerate(found):
        text_of_Ck[number, : len(passages)] = range(len(texts), len(texts) + len(passages))
        texts += [passage.tokens for passage in passages]
    if not all(map(len, texts)):
        raise DataError("a neighbor has no token; leave it out")
    return Neighbors(
        chunk_bounds_C2=np.array(bounds, dtype=np.int64).reshape(-1, 2),
        segment_ends_C=np.array(ends, dtype=np.int64),
        text_of_Ck=text_of_Ck,
        lengths_U=np.array([len(text) for text in texts], dtype=np.int64),
        tokens_1N=torch.tensor([token for text in texts for token in text], dtype=torch.int64)[None],
    )
