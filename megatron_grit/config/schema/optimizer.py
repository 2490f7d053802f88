"""Optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_grit.config.knob import knob


@dataclass(kw_only=True)
class OptimizerConfig:
    """AdamW, its schedule and clipping. Its states and fp32 main weights are sharded over data parallel ranks."""

    lr: float = knob(2e-5, above=0)
    """Peak learning rate."""
    min_lr: float = knob(0.0, at_least=0)
    """Learning rate at the end of the schedule."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Decay after warm-up."""
    warmup_ratio: float = knob(0.03, at_least=0, at_most=1)
    """Share of the steps over which the rate rises from 0."""
    warmup_steps: int | None = knob(None, at_least=0)
    """Overrides warmup_ratio."""
    weight_decay: float = knob(0.0, at_least=0)
    """Decoupled weight decay; biases and norms have none."""
    beta1: float = knob(0.9, at_least=0, below=1)
    """Adam's first decay."""
    beta2: float = knob(0.999, at_least=0, below=1)
    """Adam's second decay."""
    eps: float = knob(1e-8, above=0)
    """Adam's epsilon."""
    clip_grad: float = knob(1.0, at_least=0)
    """Largest global gradient norm. 0: no clipping."""
