"""Reads answers and what is right: a line or a JSON object for each question, in the same order in both files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from megatron_grit.config.values import shortened
from megatron_grit.data.text.lines import read_json, read_lines
from megatron_grit.errors import DataError

_JSON = (".jsonl", ".json")


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


def read_items(path: str | Path) -> Iterator[Item]:
    """The values of a JSON list, or of JSON lines; a file that begins with ``[`` is a list.

    Raises:
        DataError: it cannot be read, or is no JSON; names the line.
    """
    path, number = Path(path), 0
    for line in read_lines(path):
        if line.is_blank:
            continue
        if not number and line.content.lstrip().startswith(b"["):
            for index, value in enumerate(read_json(path), 1):
                yield Item(value, path, index, None)
            return
        number += 1
        yield Item(line.value(), path, number, line.number)


def read_predictions(path: str | Path) -> list[str]:
    """Answers in order: of ``.jsonl`` and ``.json`` the texts ``pred``, of another file its lines, where an empty line
    is an empty answer. ``.gz`` or ``.zst`` may follow in the name.

    Raises:
        DataError: it cannot be read, or an item has no text ``pred``; names the line.
    """
    path = Path(path)
    if path.name.removesuffix(".gz").removesuffix(".zst").endswith(_JSON):
        return [_text(item, item.field("pred"), "pred") for item in read_items(path)]
    return [line.text() for line in read_lines(path)]


def read_references(path: str | Path) -> list[list[str]]:
    """The references of each question, of a JSON list or of JSON lines.

    An item has ``answers`` or else ``answer``: a text, a list of texts, null, or these under ``text``, as in SQuAD's
    files and in those of Hugging Face. A question that has no answer has an empty list or null; an empty text is kept,
    and the scorer says whether it is an answer.

    Raises:
        DataError: it cannot be read, holds no question, or an item has neither key or something else there; names the
            line or the item.
    """
    references = [list(_texts(item, item.field("answers", "answer"))) for item in read_items(path)]
    if not references:
        raise DataError('holds no question; give a JSON list, or lines, of objects with "answers"', path=path)
    return references


def _texts(item: Item, value: Any) -> Iterator[str]:
    if isinstance(value, dict) and "text" in value:
        value = value["text"]
    if isinstance(value, list):
        for one in value:
            yield _text(item, one.get("text") if isinstance(one, dict) else one, "an answer")
    elif value is not None:
        yield _text(item, value, "an answer")


def _text(item: Item, value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise item.error(f"{name} must be a text, not {shortened(value)}; write it in quotes")
    return value
