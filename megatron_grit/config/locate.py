"""Reads YAML configuration files and remembers the file and line of every key, for error messages."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megatron_grit.errors import ConfigError


class Loader(yaml.SafeLoader):
    """YAML 1.2's core schema: ``010`` is ten, ``1e-5`` a number; ``1:30``, ``yes``, ``on`` and ``2024-01-01`` are text.

    PyYAML reads YAML 1.1, which has octal numbers, numbers to the base of 60, dates and eleven words for true.
    """

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """As the parent, but a key that is given twice is an error."""
        found = super().construct_mapping(node, deep)
        if len(found) < len(node.value):
            keys = [key.value for key, _ in node.value]
            twice = next((key for number, (key, _) in enumerate(node.value) if keys[number] in keys[:number]), node)
            raise yaml.constructor.ConstructorError(None, None, "a key is given twice", twice.start_mark)
        return found

    def get_single_node(self) -> Any:
        """As the parent, but what is nested too deeply is an error of YAML."""
        try:
            return super().get_single_node()
        except RecursionError:
            raise yaml.YAMLError("nested too deeply; flatten it") from None

    def construct_number(self, node: Any) -> int | float:
        """A whole number, decimal, 0o or 0x; or any other."""
        text = str(self.construct_scalar(node))
        try:
            if node.tag.endswith("float"):
                return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
            number = int(text, 0) if text[:2] in ("0o", "0x") else int(text)
            str(number)  # fails of a number that no message could show
            return number
        except ValueError:
            raise yaml.constructor.ConstructorError(None, None, f"no number: {text[:40]}", node.start_mark) from None


class Dumper(yaml.SafeDumper):
    """Writes what both YAML 1.1 and 1.2 read alike."""


_CORE = {
    "null": (r"~|null|Null|NULL|", "~nN\0"),
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    "float": (
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
}
for _name, (_pattern, _first) in _CORE.items():
    _begins = ["" if letter == "\0" else letter for letter in _first]
    for _class in (Loader, Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(f"^(?:{_pattern})$"), _begins)
for _name in ("int", "float"):
    Loader.add_constructor(f"tag:yaml.org,2002:{_name}", Loader.construct_number)


def load_yaml(text: str | bytes) -> Any:
    """The one document of a text, as YAML 1.2 reads it.

    Raises:
        yaml.YAMLError: it is not YAML, or gives a key twice.
    """
    return Loader(text).get_single_data()


@dataclass
class Located:
    """Values by dotted key ("model.num_layers"), and where each was written."""

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    """"file:line" of each key."""

    def update(self, other: Located) -> None:
        """Let ``other`` override; a value of a whole section is never replaced, only the keys that it names."""
        self.values.update(other.values)
        self.origins.update(other.origins)

    def nested(self) -> dict[str, Any]:
        """The values as a tree of mappings."""
        tree: dict[str, Any] = {}
        for key, value in self.values.items():
            *parents, last = key.split(".")
            node = tree
            for parent in parents:
                node = node.setdefault(parent, {})
            node[last] = value
        return tree


def read_yaml(path: str | Path, prefix: str = "") -> Located:
    """Read one YAML file whose top level is a mapping.

    Args:
        path: the file.
        prefix: section that the file's keys belong to, such as "model" for a preset.

    Raises:
        ConfigError: the file is missing, is not YAML, is not a mapping, or names a key twice.
    """
    path, located = Path(path), Located()
    with yaml_file(path, "configuration file") as (loader, root):
        if root is None or _is_null(root):
            return located
        if not isinstance(root, yaml.MappingNode):
            raise ConfigError(f"{path}:{root.start_mark.line + 1}: expected 'key: value' lines")
        for key, value_node, line in _walk(root, prefix, path):
            located.values[key] = loader.construct_document(value_node)
            located.origins[key] = f"{path}:{line}"
    return located


@contextmanager
def yaml_file(path: str | Path, what: str) -> Iterator[tuple[Loader, yaml.Node | None]]:
    """A YAML file, parsed: what makes values of its nodes, and the outermost one, None where there is none.

    Args:
        path: the file.
        what: "configuration file", for messages.

    Raises:
        ConfigError: the file is missing or no YAML, also where that is found while its nodes are looked at.
    """
    try:
        loader = Loader(Path(path).read_text(encoding="utf-8"))
        yield loader, loader.get_single_node()
    except OSError as error:
        raise ConfigError(f"{path}: cannot read this {what} ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not a text file (byte {error.start} is not UTF-8)") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise ConfigError(f"{where}: not valid YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None


def _walk(
    node: yaml.MappingNode, prefix: str, path: Path, above: tuple[yaml.Node, ...] = ()
) -> Iterator[tuple[str, yaml.Node, int]]:
    """Dotted key, value and 1-based line of every leaf below ``node``, which lies in the nodes ``above``."""
    if node in above:
        raise ConfigError(f"{path}:{node.start_mark.line + 1}: {prefix} holds itself, by an alias")
    seen: dict[str, int] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            raise ConfigError(f"{path}:{line}: a key must be a word")
        name = key_node.value
        if name in seen:
            raise ConfigError(f"{path}:{line}: {name} is given twice, first in line {seen[name]}")
        seen[name] = line
        key = f"{prefix}.{name}" if prefix else name
        if isinstance(value_node, yaml.MappingNode):
            yield from _walk(value_node, key, path, (*above, node))
        else:
            yield key, value_node, line


def _is_null(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:null"
