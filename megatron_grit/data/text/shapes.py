"""Other shapes of a conversation to ``messages``: ShareGPT's turns, prompts with completions that are messages, and
tools written as JSON in a string. Nothing is guessed: what has no place is an error that names the turn.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_grit.config.values import shortened
from megatron_grit.data.text.lines import parse_json
from megatron_grit.errors import DataError

_FROM = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    "environment": "environment",
    "function_call": "assistant",
}
"""Who spoke, in ShareGPT's words and those of its descendants."""


def messages_of_turns(turns: object, system: object = None) -> list[dict[str, Any]]:
    """ShareGPT's turns as messages. Turns that have a ``role`` are messages already.

    Args:
        turns: a list of ``{"from": str, "value": str}``. A ``function_call`` is the JSON of a call, or of a list of
            them, and becomes the ``tool_calls`` of an assistant's message.
        system: a system message beside the turns; None or "": none.

    Raises:
        DataError: anything else; names the turn.
    """
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, Mapping) for turn in turns):
        raise DataError('"conversations" must be a list of {"from": ..., "value": ...}, not empty')
    messages = [_message(turn, number) for number, turn in enumerate(turns)]
    if not system:
        return messages
    if not isinstance(system, str):
        raise DataError(f'"system" must be a string, not {shortened(system)}')
    if messages[0]["role"] in ("system", "developer"):
        raise DataError('there is a "system" beside the turns and another in them; leave one')
    return [{"role": "system", "content": system}, *messages]


def _message(turn: Mapping[str, Any], number: int) -> dict[str, Any]:
    if "from" not in turn and "role" in turn:
        return dict(turn)
    who = turn.get("from")
    role = _FROM.get(who) if isinstance(who, str) else None
    if role is None:
        raise DataError(f"turn {number} is from {shortened(who)}; it must be from one of {', '.join(_FROM)}")
    more = {key: value for key, value in turn.items() if key not in ("from", "value")}
    if who == "function_call":
        return {"role": role, "content": None, "tool_calls": _calls(turn.get("value"), number), **more}
    return {"role": role, "content": turn.get("value"), **more}


def _calls(value: object, number: int) -> list[dict[str, Any]]:
    try:
        held = parse_json(value.encode()) if isinstance(value, str) else value
    except (DataError, UnicodeEncodeError):
        held = None
    calls = held if isinstance(held, list) else [held]
    if not calls or not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        raise DataError(f'the function_call of turn {number} must be JSON with a "name", not {shortened(value)}')
    return [{"type": "function", "function": call} for call in calls]


def messages_of_completion(prompt: list[Any], completion: list[Any]) -> list[Any]:
    """A prompt and its completion that are both messages, as one conversation.

    Raises:
        DataError: the prompt holds an answer, which would be trained with the completion's.
    """
    if any(isinstance(message, Mapping) and message.get("role") == "assistant" for message in prompt):
        raise DataError('"prompt" holds an answer, which would be trained too; give "messages", or the prompt as text')
    return [*prompt, *completion]


def read_tools(value: object) -> list[Any] | None:
    """What an assistant may call: a list, or its JSON in a string. None: nothing.

    Raises:
        DataError: anything else.
    """
    if isinstance(value, str) and value.strip():
        try:
            value = parse_json(value.encode())
        except (DataError, UnicodeEncodeError):
            raise DataError(f'"tools" is a string that is no JSON: {shortened(value)}') from None
    if not value or (isinstance(value, str) and not value.strip()):
        return None
    if not isinstance(value, list):
        raise DataError(f'"tools" must be a list, not {shortened(value)}')
    return value
