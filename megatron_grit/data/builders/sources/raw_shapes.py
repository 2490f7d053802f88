"""What a row of each raw data set says, as conversations. One function a shape; each may serve several sources."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from megatron_grit.data.builders.sources.table_rows import TableRow
from megatron_grit.data.builders.sources.wrappers import Wrapper


class Conversation(NamedTuple):
    """What becomes a record."""

    turns: list[tuple[str, str]]
    """Role and text of each."""
    label: str | None = None
    """Behind the source's name, where a source joins several."""
    key: str | None = None
    """The row's own id."""


class LeftOut(NamedTuple):
    """A row, or a part of one, that becomes no record."""

    reason: str


class ShapeOptions(NamedTuple):
    """What a shape may be asked for."""

    wrap: Wrapper
    random: np.random.Generator
    top_k_replies: int | None = None


Shape = Callable[[TableRow, ShapeOptions], Iterator[Conversation | LeftOut]]

_SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant"}
_MARKER = re.compile(r"\[\|(Human|AI)\|\]")


def _answered(turns: list[tuple[str, str]], **facts: str | None) -> Conversation | LeftOut:
    """A conversation up to its last answer, if users and assistants take turns and every turn says something."""
    spoken = turns[1:] if turns and turns[0][0] == "system" else turns
    while spoken and spoken[-1][0] == "user":
        spoken = spoken[:-1]
    if not spoken:
        return LeftOut("without an answer")
    if [role for role, _ in spoken] != ["user", "assistant"] * (len(spoken) // 2):
        return LeftOut("not in turns")
    if not all(text.strip() for _, text in spoken):
        return LeftOut("an empty turn")
    return Conversation([*turns[: len(turns) and turns[0][0] == "system"], *spoken], **facts)


def instruction(row: TableRow, options: ShapeOptions) -> Iterator[Conversation | LeftOut]:
    """An instruction, an input that may be empty, and an answer, under the names that Alpaca and Dolly have."""
    given = row.text("input", "context") if row.value.keys() & {"input", "context"} else ""
    asked = options.wrap(row.text("instruction"), given)
    yield _answered([("user", asked), ("assistant", row.text("output", "response"))])


def unnatural(row: TableRow, options: ShapeOptions) -> Iterator[Conversation | LeftOut]:
    """An instruction with instances; constraints, of either, belong to the instruction unless they say none."""
    asked = row.text("instruction")
    for instance in _objects(row, "instances"):
        inner = row._replace(value={"constraints": row.value.get("constraints", ""), **instance})
        constraints = str(inner.value["constraints"] or "").strip()
        wanted = asked if constraints.lower().rstrip(".") in ("", "none") else f"{asked}\n{constraints}"
        yield _answered([("user", options.wrap(wanted, inner.text("input"))), ("assistant", inner.text("output"))])


def inputs_and_targets(row: TableRow, options: ShapeOptions) -> Iterator[Conversation | LeftOut]:
    """A prompt, which gets a newline unless it ends in one or in a colon, and what follows it."""
    prompt = row.text("inputs")
    yield _answered(
        [("user", prompt if prompt.endswith(("\n", ":")) else f"{prompt}\n"), ("assistant", row.text("targets"))]
    )


def pair(question: str, answer: str, system: str | None = None, label: str | None = None) -> Shape:
    """A question and an answer as they are.

    Args:
        question: key of it.
        answer: key of it.
        system: key of a system message that may be empty.
        label: key of a text that joins the source's name.
    """

    def shape(row: TableRow, options: ShapeOptions) -> Iterator[Conversation | LeftOut]:
        before = [("system", text)] if system and row.value.get(system) and (text := row.text(system)).strip() else []
        turns = [*before, ("user", row.text(question)), ("assistant", row.text(answer))]
        yield _answered(turns, label=row.text(label) if label else None)

    return shape


def speakers(row: TableRow, options: ShapeOptions) -> Iterator[Conversation | LeftOut]:
    """ShareGPT's turns; rows in which somebody else speaks are left out."""
    turns = _objects(row, "conversations")
    roles = [_SPEAKERS.get(str(turn.get("from"))) for turn in turns]
    other = next((str(turn.get("from")) for turn, role in zip(turns, roles, strict=True) if role is None), None)
    if other is not None:
        yield LeftOut(f"a turn from {other[:20]}")
        return
    texts = [row._replace(value=turn).text("value") for turn in turns]
    key = row.value.get("idx", row.value.get("id"))
    yield _answered(list(zip(map(str, roles), texts, strict=True)), key=None if key is None else str(key))


def alternating(row: TableRow, options: ShapeOptions) -> Iterator[Conversation | LeftOut]:
    """A list of texts, the user's first; an odd last one is left out."""
    texts = row.value.get("conversations")
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise row.error("conversations must be a list of texts")
    yield _answered([("assistant" if number % 2 else "user", text) for number, text in enumerate(texts)])


def transcript(row: TableRow, options: ShapeOptions) -> Iterator[Conversation | LeftOut]:
    """One text with ``[|Human|]`` and ``[|AI|]`` before the turns; what stands before the first is left out."""
    _, *parts = _MARKER.split(row.text("input"))
    turns = [
        ("user" if who == "Human" else "assistant", text.strip())
        for who, text in zip(parts[::2], parts[1::2], strict=True)
    ]
    yield _answered(turns)


def reply_tree(row: TableRow, options: ShapeOptions) -> Iterator[Conversation | LeftOut]:
    """A conversation for each path from the first message to an answer that nobody replied to, deleted messages and all
    below them left out."""
    root = row.value.get("prompt")
    if not isinstance(root, dict):
        raise row.error("has no prompt with replies")
    yield from _paths(row, root, [], options.top_k_replies)


def _paths(
    row: TableRow, node: Mapping[str, Any], before: list[tuple[str, str]], top_k: int | None
) -> Iterator[Conversation | LeftOut]:
    role = {"prompter": "user", "assistant": "assistant"}.get(str(node.get("role")))
    text, replies = node.get("text"), node.get("replies") or []
    if role is None or not isinstance(text, str) or not isinstance(replies, list):
        raise row.error("a message needs a role, prompter or assistant, a text and a list of replies")
    if node.get("deleted"):
        yield LeftOut("deleted")
        return
    turns = [*before, (role, text)]
    kept = [reply for reply in replies if isinstance(reply, dict)]
    if top_k is not None:
        kept.sort(key=_quality, reverse=True)  # stable: equals stay in their order
    below = [reply for reply in kept if not reply.get("deleted")]
    yield from (LeftOut("deleted") for _ in range(len(kept) - len(below)))
    below = below if top_k is None else below[:top_k]
    if not below and role == "assistant":
        yield _answered(turns, key=str(node["message_id"]) if "message_id" in node else None)
    for reply in below:
        yield from _paths(row, reply, turns, top_k)


def _quality(node: Mapping[str, Any]) -> float:
    value = node.get("labels") or {}
    for name in ("quality", "value"):
        value = value.get(name, 0.0) if isinstance(value, dict) else 0.0
    return float(value) if isinstance(value, int | float) else 0.0


ZERO_SHOT, FEW_SHOT, SHOTS = 60, 20, 2
"""Of a task of Super-NaturalInstructions: instances asked alone, instances behind examples, and these examples."""


def task(row: TableRow, options: ShapeOptions) -> Iterator[Conversation | LeftOut]:
    """A task of Super-NaturalInstructions: some of its instances alone, and others behind its examples."""
    definition = row.value.get("Definition")
    wanted = definition[0] if isinstance(definition, list) and definition else definition
    if not isinstance(wanted, str):
        raise row.error("has no Definition")
    instances = _objects(row, "Instances")
    order = options.random.permutation(len(instances))[: ZERO_SHOT + FEW_SHOT].tolist()
    shown = "".join(
        f"Input: {example.text('input')}\nOutput: {example.text('output')}\n\n"
        for example in (row._replace(value=one) for one in _objects(row, "Positive Examples")[:SHOTS])
    )
    for place, number in enumerate(order):
        instance = row._replace(value=instances[number])
        given, outputs = instance.text("input"), instance.value.get("output")
        answer = outputs[0] if isinstance(outputs, list) and outputs else outputs
        if not isinstance(answer, str):
            raise row.error(f"instance {number} has no output")
        behind = f"{wanted}\n\n{shown}Input: {given}\nOutput:"
        asked = options.wrap(wanted, given) if place < ZERO_SHOT else behind
        yield _answered([("user", asked), ("assistant", answer)], key=str(instance.value.get("id", number)))


def _objects(row: TableRow, name: str) -> Sequence[dict[str, Any]]:
    values = row.value.get(name)
    if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
        raise row.error(f"{name} must be a list of objects")
    return values
