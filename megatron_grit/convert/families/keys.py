"""What a family reads of a config.json, filled in and refused as transformers' class of its configuration does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_grit.errors import CheckpointError

_MAY_BE_0 = ("sliding_window", "max_window_layers")
"""Whole numbers that need not be positive; all others are sizes and counts."""
_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", list: "a list"}


@dataclass(frozen=True, kw_only=True)
class Keys:
    """Keys of config.json."""

    defaults: Mapping[str, Any]
    """Keys and what is taken where they are absent; null is none of their values."""
    nullable: Mapping[str, type] = field(default_factory=dict)
    """Types of those that may be null: null is the default of those that ``defaults`` lacks."""
    only_given: Mapping[str, type] = field(default_factory=dict)
    """Types of keys that are read where they are given, and for which there is no default."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Other names of keys. Where both are given the other name counts."""

    def read(self, hf: Mapping[str, Any]) -> dict[str, Any]:
        """The settings of config.json, defaults filled in.

        Raises:
            CheckpointError: a value of another type or range, which transformers refuses, too.
        """
        if hf.get("per_layer_config"):
            raise CheckpointError("per_layer_config is not supported: all layers must have one shape")
        settings = dict.fromkeys(self.nullable) | dict(self.defaults) | dict(hf)
        settings |= {name: hf[alias] for alias, name in self.aliases.items() if alias in hf}
        types: dict[str, type] = {name: type(value) for name, value in self.defaults.items()}
        for name, kind in (types | {**self.nullable, **self.only_given}).items():
            value = settings.get(name)
            if (value is None and name in self.nullable) or name not in settings:
                continue
            _check(name, value, kind)
        return settings


def _check(name: str, value: Any, kind: type) -> None:
    accepted = (int, float) if kind is float else kind
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        shown = "null" if value is None else repr(value)
        raise CheckpointError(f"{name} is {shown}, and must be {_WORDS[kind]}")
    least = 0 if name in _MAY_BE_0 else 1
    if kind is int and isinstance(value, int) and value < least:
        raise CheckpointError(f"{name} is {value}, and must be at least {least}")


def check_heads(hidden_size: int, num_attention_heads: int) -> None:
    """Refuse a width that heads do not divide.

    Raises:
        CheckpointError: they do not.
    """
    if hidden_size % num_attention_heads:
        raise CheckpointError(f"{num_attention_heads} attention heads do not divide the hidden size {hidden_size}")
