"""One reason why a run cannot start."""

from __future__ import annotations

from typing import NamedTuple

from megatron_grit.errors import ConfigError


class Problem(NamedTuple):
    """One reason why a run cannot start."""

    key: str
    """The key to change."""
    message: str
    error: type[ConfigError] = ConfigError
