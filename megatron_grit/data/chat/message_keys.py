"""What messages hold beside role and content: given to a template that reads it, as by transformers, or refused.

A template reads what it names. What only accompanies a message (``name``, the id of a tool's call, an author's notes)
is left out where it is not read; what says something never is:
:data:`~megatron_grit.data.text.records.TEMPLATE_KEYS`, and ``tools`` beside the messages.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

from megatron_grit.data.text.records import RESULT_ROLES, TEMPLATE_KEYS, Message
from megatron_grit.errors import DataError


def check_keys(
    messages: Sequence[Message], tools: Sequence[Any] | None, read: Collection[str] | None, template: str
) -> None:
    """Refuse what a template does not read.

    Args:
        messages: of a conversation.
        tools: that it may call.
        read: names that the template reads. None: role and content of system, user and assistant.
        template: its name.

    Raises:
        DataError: a message, or the conversation, holds something else; names it.
    """
    remedy = f"which chat template {template} does not read; leave it out, or give a template that does"
    for number, message in enumerate(messages):
        if message.role in RESULT_ROLES and read is None:
            raise DataError(f"message {number} is of role {message.role}, {remedy}")
        unread = (message.more or {}).keys() & TEMPLATE_KEYS - set(read or ())
        if unread:
            raise DataError(f"message {number} holds {min(unread)}, {remedy}")
    if tools and "tools" not in (read or ()):
        raise DataError(f"the conversation has tools, {remedy}")


def strings(value: object) -> Iterator[str]:
    """All strings in a value of JSON, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, held in value.items():
            yield from (*strings(key), *strings(held))
    elif isinstance(value, list):
        for held in value:
            yield from strings(held)
