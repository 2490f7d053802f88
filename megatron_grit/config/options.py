"""Options that several commands share, each declared once; functions take their defaults from here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_grit.config.knob import knob


@dataclass(kw_only=True)
class ModelOptions:
    """A trained model and where it runs."""

    checkpoint: str = knob(path=True)
    """Checkpoint directory, or a run's output directory for its newest one."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model runs. auto: a GPU if there is one."""


@dataclass(kw_only=True)
class TextLength:
    """How much of a text is read."""

    max_length: int = knob(512, at_least=1)
    """Longest text in tokens, template included; the rest is cut."""


@dataclass(kw_only=True)
class BatchSize:
    """How much a forward pass takes."""

    batch_tokens: int = knob(8192, at_least=1)
    """Tokens of a forward pass, padding included."""
