"""The one reader of lines and of JSON in lines: whatever reads text reads the same lines, or refuses them alike.

Files are UTF-8, with or without a byte-order mark, plain, ``.gz`` or ``.zst``. A line ends with ``\\n`` or ``\\r\\n``,
the last one with the file as well. Everything else is part of a line: ``\\r`` alone, U+2028, NUL. Refused as a whole
are UTF-16 and UTF-32, and files whose lines end with ``\\r`` alone.

JSON is that of RFC 8259, in which a value has one meaning: no NaN or Infinity, no number that is larger than a double
or has thousands of digits, no key twice in an object, no half of a surrogate pair, which is no text.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from megatron_grit.data.text.line_blocks import LONGEST_LINE, TooLong, find_inputs, iterate_blocks, partition_files
from megatron_grit.errors import DataError


class Line(NamedTuple):
    """A line of a file."""

    path: Path
    number: int
    """1-based."""
    content: bytes
    """Without its end."""

    @property
    def is_blank(self) -> bool:
        """Whether it holds nothing but white space of ASCII."""
        return not self.content.strip()

    def text(self) -> str:
        """The line as text.

        Raises:
            DataError: it is not UTF-8; names file and line.
        """
        return self._located(decode)

    def value(self) -> Any:
        """The JSON value that the line holds.

        Raises:
            DataError: there is none; names file and line.
        """
        return self._located(parse_json)

    def error(self, message: str) -> DataError:
        """An error that names the line."""
        return DataError(message, path=self.path, line=self.number)

    def _located(self, read: Callable[[bytes], Any]) -> Any:
        try:
            return read(self.content)
        except DataError as error:
            raise self.error(str(error)) from None


def read_lines(path: str | os.PathLike[str], on_block: Callable[[int, int], object] | None = None) -> Iterator[Line]:
    """Lines of text files, blank ones included.

    Args:
        path: a file, or a pattern of files, which are read in their order.
        on_block: told now and then how many bytes on disk, and how many lines, were read since the last call.

    Raises:
        DataError: no such file, one that is no UTF-8 text, or one that cannot be read to its end.
    """
    inputs = find_inputs([path])
    number, current = 0, -1
    for reference in iterate_blocks(inputs, partition_files(inputs, 1)[0]):
        number = number if reference.file == current else 0
        current = reference.file
        lines = reference.read().lines()
        for content in lines:
            number += 1
            yield Line(reference.path, number, content)
        if on_block is not None:
            on_block(reference.num_disk_bytes, len(lines))


def filled_lines(path: str | os.PathLike[str], on_block: Callable[[int, int], object] | None = None) -> Iterator[Line]:
    """As :func:`read_lines`, without blank lines."""
    return (line for line in read_lines(path, on_block) if not line.is_blank)


def read_json(path: str | os.PathLike[str]) -> Any:
    """The JSON value that a whole file holds, on any number of lines.

    Raises:
        DataError: there is none, or no such file; names the file and, where it can be told, the line.
    """
    content = "\n".join(line.text() for line in read_lines(path)).encode()
    try:
        return parse_json(content)
    except DataError as error:
        raise DataError(str(error), path=Path(path)) from None


def decode(content: bytes) -> str:
    """A line as text.

    Raises:
        DataError: it is not UTF-8, or too long. It names no place: the caller knows it.
    """
    if isinstance(content, TooLong):
        raise DataError(f"longer than {LONGEST_LINE:,} bytes; split it into several")
    try:
        return content.removesuffix(b"\r").decode()
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8: byte {error.start} of the line; convert the file") from None


def parse_json(content: bytes) -> Any:
    """The JSON value of a line, or of several.

    Raises:
        DataError: there is none, or not one only. It names no file: the caller knows it.
    """
    text = decode(content)
    try:
        value = _DECODER.decode(text)
        if b"\\ud" in content or b"\\uD" in content:
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise DataError("half of a surrogate pair (\\ud...) stands alone in a string; write the whole pair") from None
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if "\n" in text else ""
        raise DataError(f"malformed JSON: {error.msg} at {line}column {error.colno}") from None
    except RecursionError:
        raise DataError("malformed JSON: nested too deeply; flatten it") from None
    except ValueError:  # what Python's int raises
        digits = sys.get_int_max_str_digits()
        raise DataError(f"holds a whole number of more than {digits:,} digits; write it as a string") from None
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for number, key in enumerate(keys) if key in keys[:number])
        raise DataError(f"malformed JSON: the key {json.dumps(twice)} is twice in an object; leave one")
    return value


def _number(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise DataError(f"holds the number {text[:40]}, which is larger than any double; write it as a string")
    return number


def _constant(name: str) -> float:
    raise DataError(f"malformed JSON: {name} is no JSON; write null")


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_float=_number, parse_constant=_constant)
