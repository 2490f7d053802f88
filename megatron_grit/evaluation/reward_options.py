"""Options of evaluating reward models, importable without numpy."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_grit.config.knob import knob
from megatron_grit.config.options import BatchSize, ModelOptions


@dataclass(kw_only=True)
class RewardEvaluation(BatchSize, ModelOptions):
    """Which reward model, and the pairs."""

    data: str = knob(path=True)
    """JSONL of pairs: what build-preference reads, plain, .gz or .zst."""
    output: str | None = knob(None, path=True)
    """JSON file for the figures and their 95% intervals. null: they are printed only."""
