"""Questions with their answers and contexts, of the files that InstructRetro's tools read.

=====================  ========================================================================================
``question``           a text; a dialogue as a text that begins with ``User:``, or as a list of its turns
``answers``            or ``answer``: a text, a list of them, or of objects with ``text``
``longform_answer``    the long answer, where there are two
``ctxs``               retrieved: objects with ``title`` and ``text``, best first
``sub-paragraphs``     the question's own context: a text, or title and text; ``sub_paragraph`` and ``context``
                       mean the same, ``bert_pretrain_corpus_neighbours`` is a list of texts
``qa_type``            ``multi_choice_qa``: ``multichoice_options`` are put behind the question as (A), (B) ...
=====================  ========================================================================================
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_grit.config.values import shortened
from megatron_grit.data.qa.items import Item, read_items

USER, ASSISTANT = "User:", "Assistant:"
"""What stands before the turns of a dialogue."""
_OWN_CONTEXT = ("sub-paragraphs", "sub_paragraph", "context")
_SPEAKERS = {"user": USER, "assistant": ASSISTANT}


@dataclass(frozen=True, kw_only=True)
class QaRecord:
    """A question."""

    item: Item
    """What it was read from."""
    question: str
    """With its options; of a dialogue all turns, up to the user's last."""
    is_dialogue: bool
    answers: list[str]
    """Empty where there is none."""
    contexts: list[str]
    """As they stand in a prompt, best first."""


def read_records(path: str | Path, *, retrieved: bool = True, longform: bool = False) -> Iterator[QaRecord]:
    """The questions of a file, in order.

    Args:
        path: see :func:`~megatron_grit.data.qa.items.read_items`.
        retrieved: ``ctxs``, where a question has them, take the place of its own context.
        longform: ``longform_answer`` comes before other answers.

    Raises:
        DataError: it cannot be read, or a question is not of the form; names the line or the item.
    """
    for item in read_items(path):
        question, is_dialogue = _question(item)
        yield QaRecord(
            item=item,
            question=question,
            is_dialogue=is_dialogue,
            answers=_answers(item, longform),
            contexts=_contexts(item, retrieved),
        )


def _question(item: Item) -> tuple[str, bool]:
    value = item.field("question")
    if isinstance(value, list):
        return _dialogue(item, value), True
    text = item.text(value, '"question"').strip()
    if not text:
        raise item.error('"question" is empty; leave the item out')
    if text.startswith(USER):
        return text.removesuffix(ASSISTANT).rstrip(), True
    if item.fields().get("qa_type") == "multi_choice_qa" or item.fields().get("multichoice_options"):
        options = list(item.texts(item.field("multichoice_options"), "an option"))
        if not 1 < len(options) <= 26:
            raise item.error(f'"multichoice_options" must be 2 to 26 texts, not {len(options)}')
        text += "".join(f"\n({chr(ord('A') + number)}) {option}" for number, option in enumerate(options))
    return text, False


def _dialogue(item: Item, turns: Sequence[Any]) -> str:
    """Turns one under another: texts of user and assistant in turn, or objects with role and content."""
    lines = []
    for number, turn in enumerate(turns):
        role, text, what = ("user", "assistant")[number % 2], turn, f'turn {number + 1} of "question"'
        if isinstance(turn, dict):
            role, text = str(turn.get("role")), turn.get("content")
        if role not in _SPEAKERS:
            raise item.error(f"{what} has the role {shortened(role)}; give user or assistant")
        lines.append(f"{_SPEAKERS[role]} {item.text(text, what).strip()}")
    if not lines or not lines[-1].startswith(USER):
        raise item.error('"question" must be turns of which the last is the user\'s')
    return "\n\n".join(lines)


def _answers(item: Item, longform: bool) -> list[str]:
    keys = ("longform_answer", "answers", "answer") if longform else ("answers", "answer", "longform_answer")
    values = (item.fields().get(key) for key in keys)
    value = next((value for value in values if value not in (None, "", [])), None)  # where a file has the key for all
    return list(item.texts(value, "an answer"))


def _contexts(item: Item, retrieved: bool) -> list[str]:
    fields = item.fields()
    if retrieved and fields.get("ctxs"):
        if not isinstance(fields["ctxs"], list):
            raise item.error(f'"ctxs" must be a list, not {shortened(fields["ctxs"])}')
        return [_titled(item, context) for context in fields["ctxs"]]
    if "bert_pretrain_corpus_neighbours" in fields:
        return list(item.texts(fields["bert_pretrain_corpus_neighbours"], "a context"))
    value = next((fields[key] for key in _OWN_CONTEXT if fields.get(key)), None)
    if isinstance(value, list):
        if len(value) != 2:
            raise item.error(f"a context must be a text, or title and text, not {len(value)} items")
        return [_titled(item, dict(zip(("title", "text"), value, strict=True)))]
    return [] if value is None else [item.text(value, "a context")]


def _titled(item: Item, context: Any) -> str:
    if not isinstance(context, dict):
        return item.text(context, "a context")
    text = item.text(context.get("text"), '"text" of a context')
    title = item.text(context.get("title") or "", '"title" of a context')
    return f"title: {title}, source: {text}" if title else text
