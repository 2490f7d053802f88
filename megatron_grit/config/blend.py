"""What ``data.embedding`` and ``data.generative`` may say: prefixes, ``weight prefix weight prefix``, or YAML files."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from megatron_grit.config.knob import expand_path
from megatron_grit.config.locate import Loader, yaml_file
from megatron_grit.errors import ConfigError

_SUFFIXES = (".yaml", ".yml")
_KEYS = ("path", "weight", "epochs", "cap")


@dataclass(frozen=True, kw_only=True)
class BlendEntry:
    """One source of a blend."""

    path: str
    """Prefix of an indexed file."""
    weight: float | None = None
    """Share of the samples, relative to the other weights."""
    epochs: float | None = None
    """Times that the source is gone through while one without this key is gone through once."""
    cap: int | None = None
    """Most records of the source that are used."""


def expand_item(item: str) -> str:
    """An item with ``~`` and ``$NAME`` replaced, once: here in one path, by :func:`read_blend` in each of several.

    Raises:
        ConfigError: as :func:`~megatron_grit.config.knob.expand_path`.
    """
    return expand_path(item) if len(_words(item)) == 1 else item


def read_blend(items: Sequence[str], key: str) -> list[BlendEntry]:
    """The sources of a blend.

    Args:
        items: of :func:`expand_item`: prefixes; or numbers and prefixes in turn, in one string or in several; or
            ``.yaml`` files, each a list of mappings with ``path`` and, where wanted, ``weight`` or ``epochs``, and
            ``cap``.
        key: the configuration's key, for messages.

    Raises:
        ConfigError: anything else, a source that comes twice, or a blend with both weights and epochs.
    """
    entries: list[tuple[str, BlendEntry]] = []
    weight: tuple[str, float] | None = None
    for item in items:
        words = _words(item)
        for word in words:
            path = word if len(words) == 1 else _expanded(word, key)
            number = _number(word)
            if number is not None and weight is None:
                weight = (word, number)
            elif word.endswith(_SUFFIXES):
                if weight is not None:
                    raise ConfigError(f"{key}: {weight[0]} stands before the blend file {word}; weights go into it")
                entries += _read_file(path)
            else:
                if number is not None:
                    raise ConfigError(f"{key}: {word} follows {weight[0] if weight else ''}; a prefix has to")
                given = None if weight is None else _positive(weight[1], f"{key}: weight {weight[0]}")
                entries.append((key, BlendEntry(path=path, weight=given)))
                weight = None
    if weight is not None:
        raise ConfigError(f"{key}: no prefix follows the weight {weight[0]}")
    _check(entries, key)
    return [entry for _, entry in entries]


def _words(item: str) -> list[str]:
    """The numbers and prefixes of "0.3 a 0.7 b"; any other string is one prefix, spaces included."""
    words = item.split()
    return words if len(words) > 1 and _number(words[0]) is not None else [item]


def _expanded(path: str, where: str) -> str:
    try:
        return expand_path(path)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None


def _positive(value: Any, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ConfigError(f"{what} is not a positive number")
    return float(value)


def _check(entries: Sequence[tuple[str, BlendEntry]], key: str) -> None:
    seen: set[str] = set()
    weighted = next((pair for pair in entries if pair[1].weight is not None), None)
    for where, entry in entries:
        if entry.path in seen:
            raise ConfigError(
                f"{where}: {key} names {entry.path} more than once; leave one, with epochs: 2 where a run is to go "
                "through it twice"
            )
        seen.add(entry.path)
        if weighted is not None and entry.weight is None:
            what = "has epochs" if entry.epochs is not None else "has no weight"
            raise ConfigError(
                f"{where}: {entry.path} {what}, but {weighted[1].path} has a weight; give all sources of {key} "
                "weights, or none"
            )


def _read_file(path: str) -> Iterator[tuple[str, BlendEntry]]:
    """Where each entry of a blend file stands ("file:line"), and the entry."""
    with yaml_file(path, "blend file") as (loader, root):
        if not isinstance(root, yaml.SequenceNode) or not root.value:
            line = root.start_mark.line + 1 if root is not None else 1
            raise ConfigError(f"{path}:{line}: expected a list of '- path: PREFIX'")
        for node in root.value:
            where = f"{path}:{node.start_mark.line + 1}"
            yield where, _entry(node, path, where, loader)


def _entry(node: yaml.Node, path: str, where: str, loader: Loader) -> BlendEntry:
    if isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:str":
        return BlendEntry(path=_expanded(node.value, where))
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(
            f"{where}: expected a prefix, or a mapping with path and, where wanted, {', '.join(_KEYS[1:])}"
        )
    values: dict[str, Any] = {}
    for key_node, value_node in node.value:
        at = f"{path}:{key_node.start_mark.line + 1}"
        name = key_node.value
        if name not in _KEYS:
            raise ConfigError(f"{at}: unknown key {name}; a source has {', '.join(_KEYS)}")
        if name in values:
            raise ConfigError(f"{at}: {name} is given twice")
        value = loader.construct_document(value_node)
        if name == "path" and not (isinstance(value, str) and value):
            raise ConfigError(f"{at}: path is not a prefix: {value!r}")
        if name == "path":
            value = _expanded(value, f"{at}: path")
        if name in ("weight", "epochs"):
            value = _positive(value, f"{at}: {name} {value!r}")
        if name == "cap" and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ConfigError(f"{at}: cap {value!r} is not a positive whole number")
        values[name] = value
    if "path" not in values:
        raise ConfigError(f"{where}: a source without path")
    if "weight" in values and "epochs" in values:
        raise ConfigError(f"{where}: {values['path']} has both weight and epochs; give one")
    return BlendEntry(**values)
