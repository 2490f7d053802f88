"""JSONL to preference records: two answers to one prompt of which one is preferred, or one answer that is rated.

==============================================================  ===============================================
``{"chosen": [messages], "rejected": [messages]}``              a pair; the first messages are the same
``{"prompt": [messages], "chosen": [m], "rejected": [m]}``      a pair; answers may be strings
``{"prompt": str, "chosen": [messages], "rejected": [...]}``    a pair; the prompt is a user turn, or is in the messages
``{"prompt": str, "chosen": str, "rejected": str}``             a pair of texts, without a template
``{"messages": [messages], "label": bool}``                     the last answer, desirable or not
``{"prompt": ..., "completion": ..., "label": bool}``           the same; texts without a template, or messages
==============================================================  ===============================================

What both conversations of a pair begin with is their prompt, earlier answers included. ``conversations``, ``system``
and ``tools`` are read as in :mod:`~megatron_grit.data.text.records`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

from megatron_grit.config.values import shortened
from megatron_grit.data.indexed.roles import RowKind
from megatron_grit.data.text.lines import parse_json
from megatron_grit.data.text.records import Record, parse_record
from megatron_grit.errors import DataError

_SIDES = ("chosen", "rejected")
_SHARED = ("system", "tools")
"""Keys that belong to the conversation of each side."""


def parse_preference(content: bytes) -> Record:
    """The preference record of a line of JSONL.

    Raises:
        DataError: the line is none, or its two answers are equal or answer different prompts. It names no place: the
            caller knows it.
    """
    value = parse_json(content)
    if not isinstance(value, dict):
        raise DataError(f"expected a JSON object, found {shortened(value)}")
    if any(side in value for side in _SIDES):
        return _pair(value)
    if "label" in value:
        return _rated(value)
    raise DataError(
        'no "chosen" with "rejected" in this record, and no "label" beside "messages" or "prompt" with "completion"'
    )


def _pair(value: dict[str, Any]) -> Record:
    missing = next((side for side in _SIDES if value.get(side) is None), None)
    if missing is not None:
        other = _SIDES[1 - _SIDES.index(missing)]
        raise DataError(
            f'"{missing}" is missing beside "{other}"; a single answer is {{"messages": [...], "label": true}} or false'
        )
    chosen, rejected = (_side(value, side) for side in _SIDES)
    _check_pair(chosen, rejected)
    return Record(kind=RowKind.PREFERENCE, chosen=chosen, rejected=rejected)


def _side(value: dict[str, Any], side: str) -> Record:
    """One conversation of a pair."""
    prompt, answer = value.get("prompt"), value[side]
    shared = {key: value[key] for key in _SHARED if value.get(key)}
    try:
        if isinstance(answer, str):
            if prompt is None:
                raise DataError('is a string without a "prompt"')
            if isinstance(prompt, str):
                return _generative({"prompt": prompt, "completion": answer})
            return _generative(shared | {"conversations": [*_list(prompt), {"role": "assistant", "content": answer}]})
        messages = _list(answer)
        if isinstance(prompt, str):
            if _begins_with_answer(messages):
                messages = [{"role": "user", "content": prompt}, *messages]
            elif not any(_text(message) == prompt for message in messages):
                raise DataError('has messages in which the "prompt" is not')
        elif prompt is not None:
            messages = [*_list(prompt), *messages]
        return _generative(shared | {"conversations": messages})
    except DataError as error:
        raise DataError(f'"{side}": {error}') from None


def _generative(value: dict[str, Any]) -> Record:
    record = parse_record(value)
    if record.text is not None:
        raise DataError("a plain text has no answer to rate")
    return record


def _list(value: object) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise DataError(f"must be a string or a list of messages, not {shortened(value)}")
    return value


def _begins_with_answer(messages: Sequence[Any]) -> bool:
    first = messages[0]
    return isinstance(first, Mapping) and (first.get("role") == "assistant" or first.get("from") in ("gpt", "chatgpt"))


def _text(message: object) -> object:
    return message.get("content", message.get("value")) if isinstance(message, Mapping) else None


def _check_pair(chosen: Record, rejected: Record) -> None:
    """Raise unless the two differ in an answer, and before it in nothing."""
    if chosen.tools != rejected.tools:
        raise DataError('"chosen" and "rejected" have different tools')
    if chosen.completion is not None or rejected.completion is not None:
        if chosen.completion is None or rejected.completion is None:
            raise DataError('of "chosen" and "rejected" one is a string and the other has messages; give two of a kind')
        if chosen.completion.strip() == rejected.completion.strip():
            raise DataError('"chosen" and "rejected" are equal, which says nothing; leave the record out')
        return
    for number, (first, second) in enumerate(zip_longest(chosen.messages, rejected.messages)):
        if first == second:
            continue
        if first is None or second is None:
            shorter, longer = _SIDES if first is None else reversed(_SIDES)
            raise DataError(f'"{shorter}" is the beginning of "{longer}"; both need an answer that the other has not')
        if first.role != "assistant" or second.role != "assistant":
            raise DataError(
                f'the prompts differ: message {number} of "chosen" is not message {number} of "rejected", and both are '
                "to answer the same"
            )
        return
    raise DataError('"chosen" and "rejected" are equal, which says nothing; leave the record out')


def _rated(value: dict[str, Any]) -> Record:
    label = value["label"]
    if not isinstance(label, bool):
        raise DataError(f'"label" must be true or false, not {shortened(label)}')
    given = {key: held for key, held in value.items() if key != "label"}
    if isinstance(given.get("prompt"), list) and isinstance(given.get("completion"), list):
        given["conversations"] = given.pop("prompt") + given.pop("completion")
    record = _generative(given)
    if record.kind is not RowKind.GENERATIVE:
        raise DataError('"label" stands beside "query"; a rated answer has "messages", or "prompt" with "completion"')
    return Record(kind=RowKind.PREFERENCE, chosen=record if label else None, rejected=None if label else record)
