"""Reads YAML configuration files and remembers the file and line of every key, for error messages."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megatron_grit.errors import ConfigError


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
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot read this configuration file ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not a text file (byte {error.start} is not UTF-8)") from None
    try:
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        located = Located()
        if root is None or _is_null(root):
            return located
        if not isinstance(root, yaml.MappingNode):
            raise ConfigError(f"{path}:{root.start_mark.line + 1}: expected 'key: value' lines")
        for key, value_node, line in _walk(root, prefix, path):
            located.values[key] = loader.construct_document(value_node)
            located.origins[key] = f"{path}:{line}"
        return located
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
