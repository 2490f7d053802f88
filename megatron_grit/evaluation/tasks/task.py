"""What the tasks of an evaluation have in common.

A task is a file of this folder, named as the option that gives its data, with two functions: ``read`` checks the data
before a model is loaded, ``run`` evaluates a model on what ``read`` returned.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from megatron_grit.config.options import BatchSize, TextLength
from megatron_grit.evaluation.bootstrap import Interval


@dataclass(kw_only=True)
class Lengths(BatchSize, TextLength):
    """How texts are given to the model."""


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What a task measured."""

    intervals: dict[str, Interval]
    """Figures with their 95 % bootstrap intervals."""
    others: dict[str, Any] = field(default_factory=dict)
    """Counts, figures of a random order, and what follows from the figures."""
