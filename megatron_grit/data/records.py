"""JSONL to records: the four formats of GRIT, and ``messages``.

==========================================================  ===================================================
``{"query": str, "pos": [str], "neg": [str]}``              embedding, plain
``{"query": [i, s], "pos": [[i, s]], "neg": [[i, s]]}``     embedding, with instructions
``{"text": str}``                                           generation, plain
``{"text": [user, assistant, ...]}``                        generation, conversation
``{"messages": [{"role": str, "content": str}]}``           the same; a system message goes in front of the next
                                                            user turn, a trailing user turn is dropped
==========================================================  ===================================================

Other keys are ignored. The format is found for each record, not for each file.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_grit.data.batch import RowKind
from megatron_grit.errors import DataError


@dataclass(frozen=True)
class TextPair:
    """A text and its instruction; None for one without template."""

    instruction: str | None
    text: str


@dataclass(frozen=True, kw_only=True)
class Record:
    """One line of input. Of the two kinds' fields only one kind's is filled."""

    path: Path
    line: int
    """1-based."""
    kind: RowKind
    query: TextPair | None = None
    positives: list[TextPair] = field(default_factory=list)
    negatives: list[TextPair] = field(default_factory=list)
    text: str | None = None
    turns: list[str] = field(default_factory=list)
    """user, assistant, user, assistant ..."""


@dataclass(frozen=True)
class BadLine:
    """A line that is not a record."""

    error: DataError


def parse_record(value: object, path: Path, line: int) -> Record:
    """The record that a parsed JSON line holds.

    Raises:
        DataError: keys that are missing, or values of the wrong type.
    """
    where: dict[str, Any] = {"path": path, "line": line}
    if not isinstance(value, dict):
        raise DataError(f"expected a JSON object, found {_type_name(value)}", **where)
    if "query" in value:
        query = _text_pair(value["query"], "query", where)
        positives = _text_pairs(value, "pos", where)
        if not positives:
            raise DataError('"pos" is empty; a query needs at least one relevant passage', **where)
        negatives = _text_pairs(value, "neg", where) if "neg" in value else []
        return Record(kind=RowKind.EMBEDDING, query=query, positives=positives, negatives=negatives, **where)
    if "text" in value:
        text = value["text"]
        if isinstance(text, str):
            return Record(kind=RowKind.GENERATIVE, text=text, **where)
        if isinstance(text, list) and all(isinstance(turn, str) for turn in text):
            if not text or len(text) % 2:
                raise DataError(f'"text" has {len(text)} turns; it needs user and assistant turns in pairs', **where)
            return Record(kind=RowKind.GENERATIVE, turns=text, **where)
        raise DataError('"text" must be a string, or a list of user and assistant turns', **where)
    if "messages" in value:
        return Record(kind=RowKind.GENERATIVE, turns=_turns(value["messages"], where), **where)
    raise DataError('no "query", "text" or "messages" in this record', **where)


def _text_pair(value: object, key: str, where: dict[str, Any]) -> TextPair:
    if isinstance(value, str):
        return TextPair(None, value)
    if isinstance(value, list) and len(value) == 2 and all(isinstance(part, str) for part in value):
        return TextPair(value[0], value[1])
    raise DataError(f'"{key}" must hold a string or [instruction, text], found {_type_name(value)}', **where)


def _text_pairs(value: dict[str, Any], key: str, where: dict[str, Any]) -> list[TextPair]:
    if key not in value:
        raise DataError(f'"{key}" is missing', **where)
    if not isinstance(value[key], list):
        raise DataError(f'"{key}" must be a list of passages, found {_type_name(value[key])}', **where)
    return [_text_pair(passage, key, where) for passage in value[key]]


def _turns(messages: object, where: dict[str, Any]) -> list[str]:
    if not isinstance(messages, list):
        raise DataError(f'"messages" must be a list, found {_type_name(messages)}', **where)
    turns: list[str] = []
    system = ""
    for number, message in enumerate(messages):
        role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
        if not isinstance(content, str) or role not in ("system", "user", "assistant"):
            raise DataError(
                f"message {number} must have a string content and the role system, user or assistant", **where
            )
        if role == "system":
            system += content + "\n"
            continue
        expected = "assistant" if len(turns) % 2 else "user"
        if role != expected:
            raise DataError(f"message {number} is of role {role} where {expected} was expected", **where)
        turns.append(system + content if role == "user" else content)
        if role == "user":
            system = ""
    if len(turns) % 2:
        turns.pop()
    if not turns:
        raise DataError("no user turn with an answer in this conversation", **where)
    return turns


def _type_name(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number") if not isinstance(value, list) else f"a list of {len(value)}"


def read_records(path: str | Path, on_bytes: Callable[[int], None] | None = None) -> Iterator[Record | BadLine]:
    """Records of a JSONL file in order, and its bad lines where they stand. Blank lines are skipped.

    Args:
        path: UTF-8 text, gzipped where the name ends in ``.gz``.
        on_bytes: told how far the file on disk has been read since the last call, in bytes.

    Raises:
        DataError: no such file, or not text.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError("no such input file", path=path)
    zipped = path.suffix == ".gz"
    with path.open("rb") as raw, gzip.GzipFile(fileobj=raw) if zipped else nullcontext(raw) as stream:
        last = 0
        line = 0
        while True:
            line += 1
            try:
                content = stream.readline()
            except (OSError, EOFError) as error:
                raise DataError(f"cannot be read to its end: {error}", path=path, line=line) from error
            if not content:
                return
            if on_bytes is not None:
                position = raw.tell()
                on_bytes(position - last)
                last = position
            if content.strip():
                yield _parse_line(content, path, line)


def _parse_line(content: bytes, path: Path, line: int) -> Record | BadLine:
    try:
        text = content.decode("utf-8-sig" if line == 1 else "utf-8").rstrip("\r\n")
        value = json.loads(text)
        if "\\ud" in text.lower():
            json.dumps(value, ensure_ascii=False).encode()  # half of a surrogate pair is no text
        return parse_record(value, path, line)
    except UnicodeEncodeError:
        return BadLine(DataError("half of a surrogate pair (\\ud...) stands alone in a string", path=path, line=line))
    except json.JSONDecodeError as error:
        return BadLine(DataError(f"malformed JSON: {error.msg} at column {error.colno}", path=path, line=line))
    except UnicodeDecodeError as error:
        return BadLine(DataError(f"not UTF-8: byte {error.start} of the line", path=path, line=line))
    except RecursionError:
        return BadLine(DataError("malformed JSON: nested too deeply", path=path, line=line))
    except DataError as error:
        return BadLine(error)
