"""Fields of option dataclasses: a default, and as metadata what the type cannot say, such as the range of a number."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import numbers
import os
import re
import sys
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_grit.config.values import describe_type, is_of, shortened
from megatron_grit.errors import ConfigError

_BOUNDS = ("at_least", "above", "at_most", "below")
_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")
_LARGEST = (1 << 63) - 1
"""Integers beyond it fit into no array and no tensor."""
_LARGEST_FLOAT = sys.float_info.max


def knob(default: Any = dataclasses.MISSING, **facts: Any) -> Any:
    """A dataclass field with metadata.

    Args:
        default: its default; lists are copied for each instance. Left out: the field has to be given.
        facts: ``at_least``, ``above``, ``at_most`` and ``below`` bound a number, or each number of a list.
            ``path=True``: a text, or each text of a list, is a path, in which ``~`` and ``$NAME`` are replaced, or
            what a function given for True makes of it. Of a
            model: ``in_files=False``, where Hugging Face's config.json does not hold it; ``in_weights=False``, where
            trained weights do not depend on it. ``may_change``: whether a resumed run may have another value.
            ``text``: it is for a tokenizer, which takes valid Unicode only. ``empty``: it may be an empty text, as any
            field may whose default is one. For command lines, see :mod:`megatron_grit.config.commands`.
    """
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=lambda: copy.copy(default), metadata=facts)
    return dataclasses.field(default=default, metadata=facts)


def names_with(cls: type, fact: str, value: Any) -> set[str]:
    """Fields of a dataclass whose metadata say so."""
    return {field.name for field in dataclasses.fields(cls) if field.metadata.get(fact) == value}


def range_text(field: dataclasses.Field) -> str:
    """The range of a number: "at least 0 and below 1"; empty where it has none."""
    bounds = [(name.replace("_", " "), field.metadata[name]) for name in _BOUNDS if name in field.metadata]
    return " and ".join(f"{words} {bound}" for words, bound in bounds)


def check_values(options: Any) -> None:
    """Refuse values of a dataclass that are of another type than their field says, or out of its range.

    Raises:
        ConfigError: the first of them; names it.
    """
    for field in dataclasses.fields(options):
        if (problem := value_problem(type(options), field.name, getattr(options, field.name))) is not None:
            raise ConfigError(f"{field.name} {problem}")


class Checked:
    """Base of a dataclass whose values are right wherever it is made. Integers for fractions are made fractions."""

    def __post_init__(self) -> None:
        check_values(self)
        cls: type = type(self)
        for name, hint in _hints(cls).items():
            if hint is float:
                object.__setattr__(self, name, float(getattr(self, name)))  # also where it is frozen


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def value_problem(cls: type, name: str, value: Any) -> str | None:
    """What is wrong with a value for a field of a dataclass: "must be int, at least 1, not 'a'". None: nothing."""
    hint, field = _hints(cls)[name], cls.__dataclass_fields__[name]  # type: ignore[attr-defined]
    if not is_of(hint, value):
        limits = f", {range_text(field)}" if range_text(field) else ""
        return f"must be {describe_type(hint)}{limits}, not {shortened(value)}"
    for text in [value] if isinstance(value, str) else value if isinstance(value, list | tuple) else []:
        if isinstance(text, str) and field.metadata.get("text") and (problem := text_problem(text)):
            return problem
        if text == "" and not may_be_empty(field):
            return f"must not be empty{'; give a path, or leave it out' * bool(field.metadata.get('path'))}"
    return range_problem(field, value)


def may_be_empty(field: dataclasses.Field) -> bool:
    """Whether an empty text is a value of a field."""
    return bool(field.metadata.get("empty")) or field.default == ""


def text_problem(text: str) -> str | None:
    """Why no tokenizer takes a text: "holds half of a surrogate pair ...". None: it is valid Unicode."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"holds half of a surrogate pair, or a byte that is no UTF-8, at character {error.start}"
    return None


def range_problem(field: dataclasses.Field, value: Any) -> str | None:
    """What is wrong with a number or a list of them: "must be at least 1, not 0". None: nothing."""
    for number in value if isinstance(value, Sequence) and not isinstance(value, str) else (value,):
        if isinstance(number, bool) or not isinstance(number, numbers.Real):
            continue
        facts = field.metadata
        # Written so that not-a-number fails.
        inside = (
            number >= facts.get("at_least", -math.inf)
            and number <= facts.get("at_most", math.inf)
            and ("above" not in facts or number > facts["above"])
            and ("below" not in facts or number < facts["below"])
        )
        if not inside:
            return f"must be {range_text(field) or 'a number'}, not {shortened(number)}"
        if isinstance(number, numbers.Integral) and "float" not in str(field.type):
            if abs(int(number)) > _LARGEST:
                bounds = " and ".join(filter(None, [range_text(field), f"at most {_LARGEST}"]))
                return f"must be {bounds}, not {shortened(number)}"
        elif abs(typing.cast(float, number)) > _LARGEST_FLOAT:
            return f"must be a finite number, not {shortened(number)}"
    return None


def expanded(field: dataclasses.Field, value: Any) -> Any:
    """A value with ``~`` and ``$NAME`` replaced where the field is a path or a list of paths.

    Raises:
        ConfigError: an empty path, a variable that is not set, a user that is not known. It does not name the field.
    """
    path = field.metadata.get("path")
    if not path or not isinstance(value, str | Path | list | tuple):
        return value
    if isinstance(value, list | tuple):
        return type(value)(expanded(field, item) for item in value)
    return type(value)((path if callable(path) else expand_path)(os.fspath(value)))


def expand_path(text: str) -> str:
    """A path with ``~``, ``~user``, ``$NAME`` and ``${NAME}`` replaced, as a shell would.

    Raises:
        ConfigError: it is empty or holds a NUL, a variable is not set, a user is not known.
    """
    if not text:
        raise ConfigError("must not be empty; give a path, or leave it out")
    if "\0" in text:
        raise ConfigError(f"{text!r} holds a NUL, which no path has; leave it out")
    path = os.path.expanduser(text)
    if text.startswith("~") and path == text:
        raise ConfigError(f"{text!r} begins with a user that is not known; for a file of this name write ./{text}")

    def value(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if name not in os.environ:
            raise ConfigError(f"{text!r} holds ${name}, which is not set; set it, or write the path out")
        return os.environ[name]

    return _VARIABLE.sub(value, path)
