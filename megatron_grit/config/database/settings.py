"""Which settings of a database matter for what is built, and when two values of one mean the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_grit.config.database.schema import RetroDbConfig

PATHS = ("embedder", "tokenizer", "data_paths", "recall_queries")
"""Settings that are paths, of which one may be spelled in several ways."""


def matters(name: str, *configs: RetroDbConfig) -> bool:
    """Whether a setting changes what one of these configurations builds."""
    if name in ("near_threshold", "minhash_permutations"):
        return any(config.duplicates == "near" for config in configs)
    return name != "index_memory_gb" or any(config.index == "auto" for config in configs)


def setting_in_use(config: RetroDbConfig, name: str) -> Any:
    """A setting for the signature of what is built with it: its default where it does not matter, so that changing it
    then rebuilds nothing."""
    return getattr(config if matters(name, config) else RetroDbConfig, name)


def same_value(name: str, first: Any, second: Any) -> bool:
    """Whether two values of a setting mean the same."""
    return bool(_comparable(name, first) == _comparable(name, second))


def _comparable(name: str, value: Any) -> Any:
    if name not in PATHS or value is None:
        return value
    return [Path(path).resolve() for path in value] if isinstance(value, list) else Path(value).resolve()
