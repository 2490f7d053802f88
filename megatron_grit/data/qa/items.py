"""Reads files of questions: a JSON list, JSON lines, or SQuAD's articles with paragraphs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from megatron_grit.config.values import shortened
from megatron_grit.data.text.lines import read_json, read_lines
from megatron_grit.errors import DataError

ANSWER_KEYS = ("answers", "answer", "longform_answer")
"""Where the answers of a question are; the first that an item has counts."""


class Item(NamedTuple):
    """A JSON value for one question."""

    value: Any
    path: Path
    number: int
    """1-based among the items of the file."""
    line: int | None
    """Its line. None: it is of a list, which may be on any lines."""

    def error(self, message: str) -> DataError:
        """An error that names the item."""
        where = f"item {self.number}: " if self.line is None else ""
        return DataError(where + message, path=self.path, line=self.line)

    def fields(self) -> dict[str, Any]:
        """Its keys and values.

        Raises:
            DataError: it is no object.
        """
        if not isinstance(self.value, dict):
            raise self.error(f"must be an object, not {shortened(self.value)}")
        return self.value

    def field(self, *keys: str) -> Any:
        """The value of the first of these keys that the item has.

        Raises:
            DataError: it is no object, or has none of them.
        """
        named = " or ".join(f'"{key}"' for key in keys)
        if not isinstance(self.value, dict):
            raise self.error(f"must be an object with {named}, not {shortened(self.value)}")
        for key in keys:
            if key in self.value:
                return self.value[key]
        raise self.error(f"has no {named}")

    def text(self, value: Any, name: str) -> str:
        """A value that is a text.

        Raises:
            DataError: it is none.
        """
        if not isinstance(value, str):
            raise self.error(f"{name} must be a text, not {shortened(value)}; write it in quotes")
        return value

    def texts(self, value: Any, name: str) -> Iterator[str]:
        """A text, several, none where the value is null, or these under ``text``, as in SQuAD's files and in those of
        Hugging Face.

        Raises:
            DataError: something else.
        """
        if isinstance(value, dict) and "text" in value:
            value = value["text"]
        if isinstance(value, list):
            for one in value:
                yield self.text(one.get("text") if isinstance(one, dict) else one, name)
        elif value is not None:
            yield self.text(value, name)


def read_items(path: str | Path) -> Iterator[Item]:
    """The values of a JSON list (a file that begins with ``[``), of JSON lines, or the questions of SQuAD's files: an
    object with ``data``, whose articles have ``paragraphs`` with ``context`` and ``qas``. Each of those gets its
    paragraph as ``ctxs``, with the article's title.

    Raises:
        DataError: it cannot be read, or is no JSON; names the line.
    """
    path, number = Path(path), 0
    for line in read_lines(path):
        if line.is_blank:
            continue
        start = line.content.strip()
        if not number and start.startswith(b"["):
            values = read_json(path)
            yield from (Item(value, path, index, None) for index, value in enumerate(values, 1))
            return
        opens = not number and start == b"{" and ".jsonl" not in path.name  # an object over several lines
        value = read_json(path) if opens else line.value()
        if not number and isinstance(value, dict) and "data" in value and "question" not in value:
            yield from _squad_items(Item(value, path, 1, line.number))
            return
        number += 1
        yield Item(value, path, number, line.number)


def _squad_items(whole: Item) -> Iterator[Item]:
    number = 0
    for title, paragraph in _paragraphs(whole):
        context = paragraph.text(paragraph.field("context"), '"context"')
        for question in _list_of(paragraph, "qas"):
            number += 1
            item = Item(question, whole.path, number, None)
            yield item._replace(value={"ctxs": [{"title": title, "text": context}], **item.fields()})


def _paragraphs(whole: Item) -> Iterator[tuple[str, Item]]:
    for number, article in enumerate(_list_of(whole, "data"), 1):
        item = Item(article, whole.path, number, None)
        for paragraph in _list_of(item, "paragraphs"):
            yield str(item.fields().get("title", "")), Item(paragraph, whole.path, number, None)


def _list_of(item: Item, key: str) -> list[Any]:
    value = item.field(key)
    if not isinstance(value, list):
        raise item.error(f'"{key}" must be a list, not {shortened(value)}')
    return value
