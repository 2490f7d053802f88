"""Blends of data sets as Megatron-LM's scripts have them: a shell file with ``DATA_BLEND="0.7 name 0.3 other"``.

The file is read, not run: assignments of plain texts and comments are all that it may hold.
"""

from __future__ import annotations

import math
import re
import shlex
from pathlib import Path
from typing import NamedTuple

from megatron_grit.data.text.lines import read_lines
from megatron_grit.errors import ConfigError

VARIABLE = "DATA_BLEND"
_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)=(.*)", re.DOTALL)
_EXPANDED = re.compile(r"[$`]")
_NAME = re.compile(r"[\w.+-]+")


class BlendName(NamedTuple):
    """A data set of a blend."""

    weight: float
    name: str


def read_shell_blend(path: str | Path) -> list[BlendName]:
    """The data sets of a blend file.

    Raises:
        ConfigError: the file holds something else than assignments, or no blend; names the file and the entry.
        DataError: it cannot be read.
    """
    lines = [line.text() for line in read_lines(path)]
    text = "\n".join(lines)
    words = shlex.shlex(text, posix=True, punctuation_chars=";")
    words.whitespace_split = True
    found: str | None = None
    try:
        for word in words:
            if word in ("export", "declare", "readonly") or set(word) == {";"}:
                continue
            match = _ASSIGNMENT.fullmatch(word)
            if match is None:
                raise ConfigError(
                    f"{path}:{words.lineno}: {word} is no assignment; a blend file is read, not run, and holds "
                    f'{VARIABLE}="WEIGHT NAME WEIGHT NAME ..."'
                )
            if match[1] == VARIABLE:
                found = match[2].replace("\\\n", "")  # within quotes the shell joins such lines, and shlex does not
    except ValueError as error:
        raise ConfigError(f"{path}: {str(error).lower()}; close the quotes") from None
    if found is None:
        raise ConfigError(f'{path}: sets no {VARIABLE}; write {VARIABLE}="WEIGHT NAME WEIGHT NAME ..."')
    return parse_blend(found, str(path))


def parse_blend(text: str, where: str) -> list[BlendName]:
    """The pairs of "WEIGHT NAME WEIGHT NAME ...".

    Args:
        text: the pairs.
        where: name of what holds it, for messages.

    Raises:
        ConfigError: it holds something else; names the entry.
    """
    if (expanded := _EXPANDED.search(text)) is not None:
        raise ConfigError(f"{where}: {VARIABLE} holds {expanded[0]}, which is not expanded; write what it stands for")
    words, found = text.split(), list[BlendName]()
    if not words:
        raise ConfigError(f'{where}: {VARIABLE} is empty; write "WEIGHT NAME WEIGHT NAME ..."')
    for number, place in enumerate(range(0, len(words), 2), 1):
        entry = f"{where}: entry {number} of {VARIABLE}"
        weight, *rest = words[place : place + 2]
        try:
            value = float(weight)
        except ValueError:
            raise ConfigError(f"{entry}: {weight} is not a weight; each name has one before it") from None
        if not 0 < value < math.inf:
            raise ConfigError(f"{entry}: the weight {weight} is not a positive number")
        if not rest:
            raise ConfigError(f"{entry}: no name follows the weight {weight}")
        if not _NAME.fullmatch(rest[0]):
            raise ConfigError(f"{entry}: {rest[0]} is no name of a data set; give that of its folder")
        if rest[0] in (each.name for each in found):
            raise ConfigError(f"{entry}: {rest[0]} is there twice; add up its weights")
        found.append(BlendName(value, rest[0]))
    return found
