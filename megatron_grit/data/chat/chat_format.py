"""What every chat template does: it turns a conversation into pieces of text with roles."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any, Literal, Protocol

from megatron_grit.data.indexed.roles import Role
from megatron_grit.data.text.records import Message
from megatron_grit.errors import DataError

Piece = tuple[Role, str | int]
"""Text, or the id of a special token, and its role."""

TOKENIZER = "tokenizer"
"""Name of the template that comes with the tokenizer."""


PROBES = ("b", "<think>\na\n</think>\n\nb")
"""Answers to look at a template with: some can only hold one that reasons."""


RULES = 2
"""Number of the rules by which templates become ids, in the metadata of indexed files. 2: special tokens are those that
the tokenizers library finds in the whole string, and what a template reads of a message is rendered. 1: of versions
that wrote no number. A change that gives other ids has the next one."""


class ChatFormat(Protocol):
    """Turns conversations into pieces: text with roles, special tokens as ids."""

    name: str
    """Written into the indexed file."""
    read: frozenset[str]
    """Keys of messages beside role and content that it is given, and others."""
    rewrites: bool
    """Whether it writes an answer otherwise once another turn follows. Then :meth:`pieces` supervises the last answer
    alone."""
    date_in_data: str | None
    """What ``strftime_now`` says in data, as in ISO 8601. None: the template does not need it."""

    def of(self, messages: Sequence[Message], tools: Sequence[Any] | None = None) -> ChatFormat:
        """The template for a conversation that may hold more than role and content, and has tools.

        Raises:
            DataError: it holds what the template does not read.
        """

    def by_answer(self, messages: Sequence[Message]) -> bool:
        """Whether :meth:`pieces` of these messages supervises the last answer alone: of a template that
        :attr:`rewrites`, and of answers that say more than their content, calls of tools and what these returned.

        Raises:
            DataError: the template cannot hold them.
        """

    def pieces(self, messages: Sequence[Message]) -> list[Piece]:
        """A whole conversation.

        Raises:
            DataError: the template cannot hold it.
        """

    def prompt(self, messages: Sequence[Message], date: datetime | None = None) -> list[Piece]:
        """A conversation that ends with the user's turn, or a tool's, up to where the model's answer begins.

        Args:
            messages: of the conversation.
            date: what ``strftime_now`` says. None: now.

        Raises:
            DataError: the template cannot hold it.
        """

    def completion(self, prompt: str, completion: str) -> list[Piece]:
        """A text of which the prompt is given, without any template but BOS and EOS."""


def probe(chat_format: ChatFormat) -> list[Piece]:
    """Pieces of a short conversation whose answer says "b".

    Raises:
        DataError: the template cannot hold any; what it says of the plain one.
    """
    problem: DataError | None = None
    for answer in PROBES:
        try:
            return chat_format.pieces([Message("user", "a"), Message("assistant", answer)])
        except DataError as error:
            problem = problem or error
    assert problem is not None
    raise problem


def renderings(
    chat_format: ChatFormat, messages: Sequence[Message], turns: Literal["each", "last"]
) -> list[Sequence[Message]]:
    """The conversations whose pieces hold the answers as the model generates them: the whole one, or
    :meth:`~ChatFormat.by_answer` those that end with each answer. Answers before the first that asks for this stay
    together, for a rendering that ends with one of them holds all before it.

    Args:
        chat_format: the template.
        messages: a conversation.
        turns: of those: each answer, or only the last.
    """
    if not chat_format.by_answer(messages):
        return [messages]
    ends = [place + 1 for place, message in enumerate(messages) if message.role == "assistant"]
    together = sum(not chat_format.by_answer(messages[:end]) for end in ends)
    return [messages[:end] for end in (ends[max(together - 1, 0) :] if turns == "each" else ends[-1:])]


def join_completion(prompt: str, completion: str) -> list[Piece]:
    """A prompt and its completion with a space between them, unless there is white space on either side already."""
    glue = "" if not prompt or prompt[-1].isspace() or completion[:1].isspace() else " "
    pieces: list[Piece] = [(Role.USER, prompt)] if prompt else []
    return [*pieces, (Role.ANSWER, glue + completion)]
