"""Values of options: read as the type that a dataclass field declares, described for a user, and documented."""

from __future__ import annotations

import ast
import contextlib
import inspect
import json
import numbers
import os
import textwrap
import types
import typing
from pathlib import Path
from typing import Any

BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
"""As YAML 1.1 had them; YAML 1.2 has true and false."""


def convert(hint: Any, value: Any) -> Any:
    """A value from YAML, JSON or a command line as the type of its field.

    Numbers and booleans may be text: a command line has nothing else. They are read as YAML 1.2 has them: 010 is ten,
    0o10 eight.

    Raises:
        ValueError: it is no such value.
    """
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None and types.NoneType in parts:
            return None
        parts = tuple(part for part in parts if part is not types.NoneType)
        fitting = [part for part in parts if (typing.get_origin(part) in (list, tuple)) == isinstance(value, list)]
        *first, last = fitting or parts
        for part in first:
            with contextlib.suppress(ValueError):
                return convert(part, value)
        return convert(last, value)
    if origin is typing.Literal and isinstance(value, str) and value in parts:
        return value
    if origin in (list, tuple) and isinstance(value, list):
        return origin(convert(parts[0], item) for item in value)
    if hint is bool and isinstance(value, bool | str):
        return value if isinstance(value, bool) else _word(value)
    if hint is int and isinstance(value, int | str) and not isinstance(value, bool):
        return int(value, 0) if isinstance(value, str) and value[:2] in ("0o", "0x") else int(value)
    if hint is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        return float(value)
    if hint in (str, Path) and isinstance(value, str | Path):
        return hint(value)
    raise ValueError(value)


def is_of(hint: Any, value: Any) -> bool:
    """Whether a value of a program, not of a text, is one of a field. NumPy's numbers count; True is no number."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return any(is_of(part, value) for part in parts)
    if origin is typing.Literal:
        return isinstance(value, str) and value in parts
    if origin in (list, tuple):
        return isinstance(value, list | tuple) and all(is_of(parts[0], item) for item in value)
    if hint in (int, float):
        kind = numbers.Integral if hint is int else numbers.Real
        return isinstance(value, kind) and not isinstance(value, bool)
    if hint is Path:
        return isinstance(value, str | os.PathLike)
    return isinstance(value, hint) if isinstance(hint, type) else True


def shortened(value: Any) -> str:
    """A value as a message shows it, on one line, in the words of JSON and YAML; Python refuses to write integers of
    many digits."""
    if isinstance(value, int) and abs(value) >= 10**30:
        return f"an integer of {int(value.bit_length() * 0.30103) + 1} digits"
    if isinstance(value, str):
        told = repr(value[:100])
    elif isinstance(value, numbers.Number) and value is not True and value is not False:
        told = str(value)
    else:
        try:
            told = json.dumps(value, ensure_ascii=False)
        except (TypeError, ValueError):  # what JSON cannot hold, or an integer of many digits in it
            told = type(value).__name__ if isinstance(value, dict | list | tuple) else repr(value)
    return told if len(told) <= 80 else f"{told[:80]} ..."


def _word(text: str) -> bool:
    if text.lower() not in BOOLEANS:
        raise ValueError(text)
    return BOOLEANS[text.lower()]


def takes_null(hint: Any) -> bool:
    """Whether a field may be null."""
    return types.NoneType in typing.get_args(hint)


def takes_word(hint: Any) -> bool:
    """Whether a field may be a text in place of a list."""
    return typing.get_origin(hint) in (types.UnionType, typing.Union) and str in typing.get_args(hint)


def item_type(hint: Any) -> Any:
    """Type of the items of a list that may be null; None where the hint is no list."""
    for part in (hint, *typing.get_args(hint)):
        if typing.get_origin(part) in (list, tuple):
            return typing.get_args(part)[0]
    return None


def describe_type(hint: Any) -> str:
    """A type in the words of a user: "int or null", "one of mean, cls"."""
    if typing.get_origin(hint) is typing.Literal:
        return "one of " + ", ".join(typing.get_args(hint))
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return " or ".join(describe_type(part) for part in typing.get_args(hint))
    if typing.get_origin(hint) in (list, tuple):
        return "a list such as [a, b]"
    if hint is bool:
        return "true or false"
    return "null" if hint is types.NoneType else hint.__name__


def documents(cls: type) -> dict[str, str]:
    """The string under each field of a dataclass and of its bases, on one line."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        try:
            (definition,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        except OSError:  # made at run time, of fields that are sections
            continue
        assert isinstance(definition, ast.ClassDef)
        for node, below in zip(definition.body, definition.body[1:], strict=False):
            is_text = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and is_text:
                found[node.target.id] = " ".join(str(below.value.value).split())  # type: ignore[attr-defined]
    return found
