"""Adapters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_grit.config.knob import knob


@dataclass(kw_only=True)
class AdapterConfig:
    """Low-rank adapters beside frozen linear layers. Checkpoints then hold what is trained, and name the base."""

    kind: Literal["none", "lora", "dora"] = "none"
    """lora: arXiv 2106.09685. dora: with a trained length for each row of the adapted weights, arXiv 2402.09353."""
    rank: int = knob(16, at_least=1)
    """Rank of each adapter."""
    alpha: float = knob(32.0, above=0)
    """Adapters are multiplied by alpha / rank."""
    dropout: float = knob(0.0, at_least=0, below=1, may_change=True)
    """Dropout on an adapter's input."""
    rank_pattern: list[str] = knob([])
    """Other ranks, such as q_proj=4 or layers.1.mlp.up_proj=8: a regular expression for the end of a projection's name,
    from a dot on. The first that fits counts."""
    alpha_pattern: list[str] = knob([])
    """Other alphas, likewise."""
    targets: list[str] | None = None
    """Projections with an adapter, of q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj and down_proj, in attention,
    feed-forward layers and experts. null: all that the model has."""
    rslora: bool = False
    """Multiply by alpha / sqrt(rank) instead (arXiv 2312.03732)."""
    quantize: Literal["none", "nf4"] = "none"
    """Hold the adapted layers' frozen weights in 4 bits (QLoRA, arXiv 2305.14314)."""
    double_quantize: bool = True
    """With quantize, hold the scales of blocks in 8 bits."""
    load: str | None = knob(None, may_change=True, path=True)
    """Adapters to start from: a checkpoint of a run with adapters, or its output_dir. null: fresh ones."""
