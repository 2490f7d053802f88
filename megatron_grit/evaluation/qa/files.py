"""Reads answers and what is right: a line or a JSON object for each question, in the same order in both files."""

from __future__ import annotations

from pathlib import Path

from megatron_grit.data.qa.items import ANSWER_KEYS, read_items
from megatron_grit.data.text.lines import read_lines
from megatron_grit.errors import DataError

_JSON = (".jsonl", ".json")


def read_predictions(path: str | Path) -> list[str]:
    """Answers in order: of ``.jsonl`` and ``.json`` the texts ``pred``, of another file its lines, where an empty line
    is an empty answer. ``.gz`` or ``.zst`` may follow in the name.

    Raises:
        DataError: it cannot be read, or an item has no text ``pred``; names the line.
    """
    path = Path(path)
    if path.name.removesuffix(".gz").removesuffix(".zst").endswith(_JSON):
        return [item.text(item.field("pred"), "pred") for item in read_items(path)]
    return [line.text() for line in read_lines(path)]


def read_references(path: str | Path) -> list[list[str]]:
    """The references of each question, of a JSON list or of JSON lines.

    An item has ``answers`` or else ``answer``, or else ``longform_answer``: a text, a list of texts, null, or these
    under ``text``, as in SQuAD's files, which are read as well, and in those of Hugging Face. A question that has no
    answer has an empty list or null; an empty text is kept, and the scorer says whether it is an answer.

    Raises:
        DataError: it cannot be read, holds no question, or an item has neither key or something else there; names the
            line or the item.
    """
    references = [list(item.texts(item.field(*ANSWER_KEYS), "an answer")) for item in read_items(path)]
    if not references:
        raise DataError('holds no question; give a JSON list, or lines, of objects with "answers"', path=path)
    return references
