"""Norms that allow sequence parallelism. The engine's own torch norm refuses it (torch_norm.py:32)."""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig


class RMSNorm(torch.nn.RMSNorm):
    """Root mean square norm (arXiv 1910.07467)."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        mark_sequence_parallel(self, config)


class LayerNorm(torch.nn.LayerNorm):
    """Layer norm (arXiv 1607.06450)."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        mark_sequence_parallel(self, config)


def mark_sequence_parallel(module: torch.nn.Module, config: TransformerConfig) -> None:
    """Have the engine sum these gradients over tensor parallel ranks, each of which sees a part of the sequence."""
    for parameter in module.parameters():
        parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


def norm_class(name: str) -> type[torch.nn.Module]:
    """The class of ``model.normalization``."""
    return {"rmsnorm": RMSNorm, "layernorm": LayerNorm}[name]
