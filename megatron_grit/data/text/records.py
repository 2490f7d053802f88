"""JSONL to records: the formats of GRIT and of instruction tuning.

==========================================================  ===================================================
``{"query": str, "pos": [str], "neg": [str]}``              embedding, plain
``{"query": [i, s], "pos": [[i, s]], "neg": [[i, s]]}``     embedding, with instructions
``{"text": str}``                                           generation, plain
``{"text": [user, assistant, ...]}``                        generation, conversation
``{"prompt": str, "completion": str}``                      generation, a text of which the prompt is given; lists
                                                            of messages are a conversation
``{"messages": [{"role": str, "content": str}]}``           generation, conversation with system messages; a user
                                                            turn at its end that nobody answers is dropped.
                                                            Beside it ``"tools"``, a list or its JSON
``{"conversations": [{"from": str, "value": str}]}``        the same, in ShareGPT's words; ``"system"`` may stand beside
==========================================================  ===================================================

Other keys of a record mean nothing here; those of embedding records are kept beside what was read. Other keys of a
message are for its template (:func:`~megatron_grit.data.chat.message_keys.check_keys`). The format is found for each
record, not for each file, in this order of the keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from megatron_grit.config.knob import text_problem
from megatron_grit.config.values import shortened
from megatron_grit.data.indexed.roles import RowKind
from megatron_grit.data.text.lines import Line, filled_lines, parse_json
from megatron_grit.data.text.shapes import messages_of_completion, messages_of_turns, read_tools
from megatron_grit.errors import DataError

_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "environment": "environment",
}
"""developer is the name that OpenAI's newer models have for system."""
RESULT_ROLES = frozenset(("tool", "environment"))
"""Of messages with what a call gave, two names for one thing: templates read either."""
CALL_KEYS = frozenset(("tool_calls", "function_call", "function_calls"))
"""Of an assistant's message that calls tools."""
TEMPLATE_KEYS = CALL_KEYS | {"functions", "reasoning_content", "reasoning", "thinking", "refusal", "audio"}
"""Keys of messages that say something beside ``content``; of no meaning while nothing is in them."""
_ACCOMPANYING = {"name", "tool_call_id"}
_EMPTY = {"annotations"}
"""What clients send back as they got it: of no meaning while nothing is in it."""


class TextPair(NamedTuple):
    """A text and its instruction; None for one without template."""

    instruction: str | None
    text: str


class Message(NamedTuple):
    """One turn of a conversation."""

    role: str
    """"system", "user", "assistant", "tool" or "environment"."""
    content: str
    more: dict[str, Any] | None = None
    """Other keys that hold something, such as ``tool_calls``, for a template that reads them."""


@dataclass(slots=True, kw_only=True)
class Record:
    """One line of input. Of the formats' fields only those of one are filled."""

    path: Path | None = None
    line: int = 0
    """1-based."""
    kind: RowKind
    query: TextPair | None = None
    positives: list[TextPair] = field(default_factory=list)
    negatives: list[TextPair] = field(default_factory=list)
    text: str | None = None
    prompt: str | None = None
    completion: str | None = None
    messages: list[Message] = field(default_factory=list)
    """User and assistant in turn, beginning with the user and ending with the assistant; before a user's message any
    number of system messages, after an assistant's messages of tools and the assistant again."""
    is_unanswered: bool = field(default=False, compare=False)
    """Whether turns stood behind the last answer, which nothing is learned from; they are left out."""
    tools: list[Any] | None = None
    """What the assistant may call, for a template that reads it."""
    chosen: Record | None = None
    """Of a preference record: the conversation or completion with the preferred answer, or a desirable one."""
    rejected: Record | None = None
    """Of a preference record: the one with the other answer, or with an undesirable one."""
    other: dict[str, object] = field(default_factory=dict)
    """What an embedding record holds besides, by its keys."""

    @property
    def rated(self) -> list[tuple[str, Record]]:
        """The conversations of a preference record by the name of their field."""
        sides = (("chosen", self.chosen), ("rejected", self.rejected))
        return [(name, side) for name, side in sides if side is not None]

    @property
    def pairs(self) -> list[TextPair]:
        """The texts of an embedding record: query, positives, negatives."""
        return [] if self.query is None else [self.query, *self.positives, *self.negatives]


@dataclass(frozen=True)
class BadLine:
    """A line that is not a record."""

    error: DataError


def parse_record(value: object) -> Record:
    """The record that a parsed JSON line holds.

    Raises:
        DataError: keys that are missing, or values of the wrong type. It names no place: the caller knows it.
    """
    if not isinstance(value, dict):
        raise DataError(f"expected a JSON object, found {_type_name(value)}")
    if "query" in value:
        query = _text_pair(value["query"], "query")
        positives = _text_pairs(value, "pos")
        if not positives:
            raise DataError('"pos" is empty; a query needs at least one relevant passage')
        negatives = _text_pairs(value, "neg") if "neg" in value else []
        other = {key: held for key, held in value.items() if key not in ("query", "pos", "neg")}
        return Record(kind=RowKind.EMBEDDING, query=query, positives=positives, negatives=negatives, other=other)
    if "text" in value:
        text = value["text"]
        if isinstance(text, str):
            return Record(kind=RowKind.GENERATIVE, text=text)
        if isinstance(text, list) and all(isinstance(turn, str) for turn in text):
            if not text or len(text) % 2:
                raise DataError(f'"text" has {len(text)} turns; it needs user and assistant turns in pairs')
            return Record(kind=RowKind.GENERATIVE, messages=alternate(text))
        raise DataError('"text" must be a string, or a list of user and assistant turns')
    if "prompt" in value and "completion" in value:
        prompt, completion = value["prompt"], value["completion"]
        if isinstance(prompt, list) and isinstance(completion, list):
            return _conversation(value, messages_of_completion(prompt, completion))
        if not isinstance(prompt, str) or not isinstance(completion, str):
            raise DataError('"prompt" and "completion" must be strings')
        return Record(kind=RowKind.GENERATIVE, prompt=prompt, completion=completion)
    if "messages" in value:
        return _conversation(value, value["messages"])
    if "conversations" in value:
        return _conversation(value, messages_of_turns(value["conversations"], value.get("system")))
    raise DataError('no "query", "text", "messages", "conversations", or "prompt" with "completion" in this record')


def _conversation(value: dict[str, Any], messages: object) -> Record:
    tools, turns = read_tools(value.get("tools")), read_messages(messages)
    answered = _answered(turns)
    is_unanswered = len(answered) < len(turns)
    return Record(kind=RowKind.GENERATIVE, messages=answered, tools=tools, is_unanswered=is_unanswered)


def alternate(turns: list[str]) -> list[Message]:
    """Messages of a conversation without system messages: user, assistant, user, assistant ..."""
    return [Message("assistant" if number % 2 else "user", turn) for number, turn in enumerate(turns)]


def _text_pair(value: object, key: str) -> TextPair:
    if isinstance(value, str):
        return TextPair(None, value)
    if isinstance(value, list) and len(value) == 2 and all(isinstance(part, str) for part in value):
        return TextPair(value[0], value[1])
    raise DataError(f'"{key}" must hold a string or [instruction, text], found {_type_name(value)}')


def _text_pairs(value: dict[str, object], key: str) -> list[TextPair]:
    if key not in value:
        raise DataError(f'"{key}" is missing')
    passages = value[key]
    if not isinstance(passages, list):
        raise DataError(f'"{key}" must be a list of passages, found {_type_name(passages)}')
    return [_text_pair(passage, key) for passage in passages]


def read_messages(value: object, *, all_keys: bool = False) -> list[Message]:
    """The turns of a conversation: user and assistant in turn, the user first, system messages before a user's, those
    of tools between an assistant's message and its next; they have to follow ``tool_calls``, and may follow any other
    answer, whose text may hold a call. The one rule for what is trained on and for what is asked.

    Args:
        value: a list of objects with ``role`` (system, developer, user, assistant, tool or environment) and
            ``content``, a string or a list of text parts. Other keys are kept, for the template to read or to refuse.
        all_keys: refuse keys that no template is known to read, such as images, rather than leave it to the template.

    Raises:
        DataError: anything else; names the message.
    """
    if not isinstance(value, Sequence) or not value or not all(isinstance(message, Mapping) for message in value):
        raise DataError('messages must be a list of {"role": ..., "content": ...}, not empty')
    messages: list[Message] = []
    expected = "user"
    for number, item in enumerate(value):
        role = _ROLES.get(given) if isinstance(given := item.get("role"), str) else None
        if role is None:
            raise DataError(f"the role of message {number} must be one of {', '.join(_ROLES)}, not {shortened(given)}")
        if role == "assistant" and item.get("weight") == 0:
            raise DataError(f"message {number} has the weight 0, and every answer is trained; leave the record out")
        if all_keys:
            _refuse_other_keys(item, number)
        more = {key: held for key, held in item.items() if key not in ("role", "content") and held}
        calls = role == "assistant" and bool(more.keys() & CALL_KEYS)
        if calls and item.get("content") is None:
            content, more["content"] = "", None  # as the template gets it
        else:
            content = _content(item.get("content"), f"content of message {number}")
        answered = number > 0 and expected == "user" and messages[-1].role == "assistant"
        fits = "tool" in expected or answered if role in RESULT_ROLES else role in expected
        if not fits and not (role == "system" and expected == "user"):
            raise DataError(f"message {number} is of role {role} where {expected} was expected")
        messages.append(Message(role, content, more or None))
        if role != "system":
            after = {"user": "assistant"} | dict.fromkeys(RESULT_ROLES, "tool or assistant")
            expected = after.get(role, "tool" if calls else "user")
    return messages


def _refuse_other_keys(message: Mapping[str, Any], number: int) -> None:
    known = {"role", "content"} | TEMPLATE_KEYS | _ACCOMPANYING
    for key, value in message.items():
        if key not in known and not (key in _EMPTY and not value):
            raise DataError(f"message {number} holds {key}, which this model's template has no place for; leave it out")


def _content(value: object, name: str) -> str:
    if not isinstance(value, list):
        return check_text(value, name)
    if not all(isinstance(part, Mapping) and part.get("type") == "text" for part in value):
        raise DataError(f'{name} must be a string, or a list of {{"type": "text", "text": ...}} alone')
    return "\n".join(check_text(part.get("text"), f"a text in {name}") for part in value)


def check_text(value: object, name: str) -> str:
    """The value, if it is a text that a tokenizer takes.

    Raises:
        DataError: it is no text or no valid Unicode; begins with ``name``.
    """
    if not isinstance(value, str):
        raise DataError(f"{name} must be a string, not {shortened(value)}")
    if (problem := text_problem(value)) is not None:
        raise DataError(f"{name} {problem}")
    return value


def _answered(messages: list[Message]) -> list[Message]:
    """A conversation up to its last answer."""
    answered = max((place for place, message in enumerate(messages, 1) if message.role == "assistant"), default=0)
    if not answered:
        raise DataError("no user turn with an answer in this conversation")
    return messages[:answered]


def _type_name(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number") if not isinstance(value, list) else f"a list of {len(value)}"


def parse_line(content: bytes) -> Record:
    """The record of a line of JSONL.

    Raises:
        DataError: the line is not a record. It names no place: the caller knows it.
    """
    return parse_record(parse_json(content))


def read_records(path: str | Path, on_bytes: Callable[[int], None] | None = None) -> Iterator[Record | BadLine]:
    """Records of JSONL files in order, and their bad lines where they stand. Blank lines are skipped.

    Args:
        path: a file or a glob pattern; UTF-8 text, compressed where the name ends in ``.gz`` or ``.zst``.
        on_bytes: told how far the file on disk has been read since the last call, in bytes.

    Raises:
        DataError: no such file, or it cannot be read to its end.
    """
    yield from map(_located, filled_lines(path, None if on_bytes is None else lambda num_bytes, _: on_bytes(num_bytes)))


def _located(line: Line) -> Record | BadLine:
    try:
        record = parse_line(line.content)
    except DataError as error:
        return BadLine(line.error(str(error)))
    record.path, record.line = line.path, line.number
    return record
