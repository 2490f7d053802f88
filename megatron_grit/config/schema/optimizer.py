"""Optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(kw_only=True)
class OptimizerConfig:
    """AdamW, its schedule and clipping. Its states and fp32 main weights are sharded over data parallel ranks."""

    lr: float = 2e-5
    """Peak learning rate."""
    min_lr: float = 0.0
    """Learning rate at the end of the schedule."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Decay after warm-up."""
    warmup_ratio: float = 0.03
    """Share of the steps over which the rate rises from 0."""
    warmup_steps: int | None = None
    """Overrides warmup_ratio."""
    weight_decay: float = 0.0
    """Decoupled weight decay; biases and norms have none."""
    beta1: float = 0.9
    """Adam's first decay."""
    beta2: float = 0.999
    """Adam's second decay."""
    eps: float = 1e-8
    """Adam's epsilon."""
    clip_grad: float = 1.0
    """Largest global gradient norm. 0: no clipping."""
