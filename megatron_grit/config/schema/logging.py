"""Metrics."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_grit.config.knob import knob


@dataclass(kw_only=True)
class LoggingConfig:
    """What is written about a run, besides metrics.jsonl."""

    interval: int = knob(1, at_least=1)
    """Steps between lines of metrics.jsonl."""
    tensorboard: bool = False
    """Write TensorBoard events under output_dir/tensorboard."""
    wandb_project: str | None = None
    """Weights & Biases project. null: off. Needs the wandb package."""
    progress: bool = True
    """Progress on rank 0: a bar in a terminal, a line every 30 seconds in a log."""
