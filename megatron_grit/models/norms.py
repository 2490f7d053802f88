"""Norms that allow sequence parallelism. The engine's own torch norm refuses it (torch_norm.py:32)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class RMSNorm(torch.nn.RMSNorm):
    """Root mean square norm (arXiv 1910.07467)."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.offset = _set_up(self, config)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        return F.rms_norm(x, self.normalized_shape, _scale(self), self.eps)


class LayerNorm(torch.nn.LayerNorm):
    """Layer norm (arXiv 1607.06450)."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.offset = _set_up(self, config)

    def forward(self, input: Tensor) -> Tensor:
        """Normalise the last dimension."""
        return F.layer_norm(input, self.normalized_shape, _scale(self), self.bias, self.eps)


def _set_up(norm: torch.nn.RMSNorm | torch.nn.LayerNorm, config: TransformerConfig) -> int:
    """What is added to the weight, which starts so that the sum is 1."""
    mark_sequence_parallel(norm, config)
    if not config.layernorm_zero_centered_gamma:
        return 0
    torch.nn.init.zeros_(norm.weight)
    return 1


def _scale(norm: RMSNorm | LayerNorm) -> Tensor:
    """What the normalised states are multiplied by. In the weight's precision, as Megatron-LM's kernels have it."""
    return norm.weight + norm.offset if norm.offset else norm.weight


def mark_sequence_parallel(module: torch.nn.Module, config: TransformerConfig) -> None:
    """Have the engine sum these gradients over tensor parallel ranks, each of which sees a part of the sequence."""
    for parameter in module.parameters():
        parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


def norm_class(name: str) -> type[torch.nn.Module]:
    """The class of ``model.normalization``."""
    return {"rmsnorm": RMSNorm, "layernorm": LayerNorm}[name]
