"""What callers give to be answered or embedded, checked by one rule for the command line, programs and the server."""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_grit.config.values import shortened
from megatron_grit.data.text import records
from megatron_grit.data.text.records import Message, check_text
from megatron_grit.errors import DataError

Conversation = list[Message]
"""What :func:`~megatron_grit.data.text.records.read_messages` gives."""

EMPTY_TEXT = "is empty; there is nothing to pool"


def read_conversations(given: Any) -> tuple[list[Conversation], bool]:
    """Conversations to answer, and whether a single one was given, rather than a list of them.

    Args:
        given: a prompt of the user's, a list of messages, or a list of prompts and lists of messages.

    Raises:
        DataError: there is none, or one is empty, of other types, or of roles or texts that there are not.
    """
    if isinstance(given, str):
        return [read_messages(given)], True
    if isinstance(given, Mapping) or (isinstance(given, Sequence) and given and isinstance(given[0], Mapping)):
        return [read_messages(given)], True
    if not isinstance(given, Sequence) or not given:
        raise DataError("there is nothing to answer; give a prompt, messages, or several of them")
    return [read_messages(one) for one in given], False


def read_messages(given: Any) -> Conversation:
    """Messages of one conversation; a text is what the user says.

    Raises:
        DataError: as :func:`read_conversations`; names the message.
    """
    if isinstance(given, str):
        return [Message("user", _filled(given, "prompt"))]
    messages = records.read_messages(given, all_keys=True)
    for number, message in enumerate(messages):
        if message.role == "user":
            _filled(message.content, f"content of message {number}")
    return messages


def check_texts(given: Any, name: str) -> list[str]:
    """Texts of which each is one that a tokenizer takes.

    Args:
        given: a text or a list of them.
        name: what one of them is called in errors.

    Raises:
        DataError: one is not; names it by its number.
    """
    if not isinstance(given, Sequence) or isinstance(given, bytes):
        raise DataError(f"{name} must be a string or a list of strings, not {shortened(given)}")
    texts = [given] if isinstance(given, str) else given
    return [check_text(text, f"{name} {number}") for number, text in enumerate(texts)]


def _filled(value: Any, name: str) -> str:
    if not check_text(value, name).strip():
        raise DataError(f"{name} must not be empty")
    return value


def read_texts(given: Any, vocab_size: int, name: str = "texts") -> tuple[list[str | list[int]], bool]:
    """Texts to embed, each a string or the ids of its tokens, and whether a single one was given.

    Args:
        given: a text, the ids of one, or a list of either.
        vocab_size: number of ids.
        name: of what is given, in errors.

    Raises:
        DataError: there is none, or one is empty, of another type, or of ids outside the vocabulary; names it.
    """
    if not isinstance(given, Sequence) or isinstance(given, bytes):
        raise DataError(f"{name} must be a string, a list of strings, or ids of tokens, not {shortened(given)}")
    single = isinstance(given, str) or (bool(given) and isinstance(given[0], numbers.Integral))
    several = [given] if single else given
    if not several:
        raise DataError("there is no text to encode")
    return [_read_text(text, f"text {number}", vocab_size) for number, text in enumerate(several)], single


def _read_text(text: Any, name: str, vocab_size: int) -> str | list[int]:
    if isinstance(text, Sequence) and not isinstance(text, str | bytes):
        for index in text:
            is_id = isinstance(index, numbers.Integral) and not isinstance(index, bool)
            if not is_id or not 0 <= index < vocab_size:
                raise DataError(f"{name} holds {shortened(index)}; ids of tokens are from 0 to {vocab_size - 1}")
        if not text:
            raise DataError(f"{name} {EMPTY_TEXT}")
        return [int(index) for index in text]
    if not check_text(text, name).strip():
        raise DataError(f"{name} {EMPTY_TEXT}")
    return text
