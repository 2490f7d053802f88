"""What every chat template does: it turns a conversation into pieces of text with roles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

from megatron_grit.data.indexed.roles import Role
from megatron_grit.data.text.records import Message
from megatron_grit.errors import DataError

Piece = tuple[Role, str | int]
"""Text, or the id of a special token, and its role."""

TOKENIZER = "tokenizer"
"""Name of the template that comes with the tokenizer."""


PROBES = ("b", "<think>\na\n</think>\n\nb")
"""Answers to look at a template with: some can only hold one that reasons."""


class ChatFormat(Protocol):
    """Turns conversations into pieces: text with roles, special tokens as ids."""

    name: str
    """Written into the indexed file."""
    rewrites: bool
    """Whether it writes an answer otherwise once another turn follows. Then :meth:`pieces` supervises the last answer
    alone."""

    def pieces(self, messages: Sequence[Message]) -> list[Piece]:
        """A whole conversation.

        Raises:
            DataError: the template cannot hold it.
        """

    def prompt(self, messages: Sequence[Message]) -> list[Piece]:
        """A conversation that ends with the user's turn, up to where the model's answer begins."""

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
    """The conversations whose pieces hold the answers as the model generates them: the whole one, or of a template that
    :attr:`~ChatFormat.rewrites` earlier answers, those that end with each answer.

    Args:
        chat_format: the template.
        messages: a conversation.
        turns: of a template that rewrites: each answer, or only the last.
    """
    if not chat_format.rewrites:
        return [messages]
    ends = [place + 1 for place, message in enumerate(messages) if message.role == "assistant"]
    return [messages[:end] for end in (ends if turns == "each" else ends[-1:])]


def join_completion(prompt: str, completion: str) -> list[Piece]:
    """A prompt and its completion with a space between them, unless there is white space on either side already."""
    glue = "" if not prompt or prompt[-1].isspace() or completion[:1].isspace() else " "
    pieces: list[Piece] = [(Role.USER, prompt)] if prompt else []
    return [*pieces, (Role.ANSWER, glue + completion)]
