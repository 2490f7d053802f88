"""What every chat template does: it turns a conversation into pieces of text with roles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from megatron_grit.data.indexed.roles import Role
from megatron_grit.data.text.records import Message

Piece = tuple[Role, str | int]
"""Text, or the id of a special token, and its role."""

TOKENIZER = "tokenizer"
"""Name of the template that comes with the tokenizer."""


class ChatFormat(Protocol):
    """Turns conversations into pieces: text with roles, special tokens as ids."""

    name: str
    """Written into the indexed file."""

    def pieces(self, messages: Sequence[Message]) -> list[Piece]:
        """A whole conversation.

        Raises:
            DataError: the template cannot hold it.
        """

    def prompt(self, messages: Sequence[Message]) -> list[Piece]:
        """A conversation that ends with the user's turn, up to where the model's answer begins."""

    def completion(self, prompt: str, completion: str) -> list[Piece]:
        """A text of which the prompt is given, without any template but BOS and EOS."""


def join_completion(prompt: str, completion: str) -> list[Piece]:
    """A prompt and its completion with a space between them, unless there is white space on either side already."""
    glue = "" if not prompt or prompt[-1].isspace() or completion[:1].isspace() else " "
    pieces: list[Piece] = [(Role.USER, prompt)] if prompt else []
    return [*pieces, (Role.ANSWER, glue + completion)]
