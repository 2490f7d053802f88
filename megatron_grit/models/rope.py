"""Rotary position embeddings (RoPE, arXiv 2104.09864), with the stretched periods of ``model.rope_type`` as
transformers computes them from ``rope_parameters``.

linear: all periods are longer (position interpolation, arXiv 2306.15595). llama3: those beyond a length are, with a
ramp between (arXiv 2407.21783, section 3.4). yarn: likewise by channel, and attention is sharper (arXiv 2309.00071).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_grit.config.schema import ModelConfig
from megatron_grit.config.shape import head_channels, query_scale


class RotaryAngles:
    """The angles by which queries and keys are rotated.

    Args:
        model: the decoder's shape.
        device: where the frequencies are kept.
    """

    def __init__(self, model: ModelConfig, device: torch.device) -> None:
        num_channels = int(head_channels(model) * model.rotary_percent)
        exponents = torch.arange(0, num_channels, 2, dtype=torch.float32, device=device) / num_channels
        self._frequencies = stretched_frequencies(model, 1.0 / model.rotary_base**exponents)
        self.is_interleaved = model.rotary_interleaved

    def __call__(self, positions_T: Tensor) -> Tensor:
        """fp32 [T, 1, 1, C] for C rotated channels of a head, the layout that the engine's attention expects."""
        angles = torch.outer(positions_T.to(self._frequencies), self._frequencies)
        if self.is_interleaved:
            return angles.repeat_interleave(2, 1)[:, None, None]
        return torch.cat([angles, angles], 1)[:, None, None]


def stretched_frequencies(model: ModelConfig, frequencies: Tensor) -> Tensor:
    """Angle per position of each pair of channels.

    Args:
        model: its shape.
        frequencies: fp32 [C / 2], of default RoPE over C channels.

    Returns:
        fp32 [C / 2].
    """
    if model.rope_type == "linear":
        return frequencies / model.rope_factor
    if model.rope_type == "llama3":
        return _between(frequencies, model.rope_factor, _llama3_share(model, frequencies))
    if model.rope_type == "yarn":
        return _between(frequencies, model.rope_factor, _yarn_share(model, 2 * len(frequencies)).to(frequencies.device))
    return frequencies


def attention_factor(model: ModelConfig) -> float:
    """Factor by which yarn scales the rotated channels of queries and keys; 1 for other types."""
    if model.rope_type != "yarn":
        return 1.0
    if model.rope_attention_factor is not None:
        return model.rope_attention_factor
    return 0.1 * math.log(model.rope_factor) + 1.0 if model.rope_factor > 1 else 1.0


def attention_scale(model: ModelConfig) -> float | None:
    """Factor of the attention scores. None: 1 / sqrt(channels of a head).

    A factor of yarn is part of it, because then all channels are rotated (config/checks/run.py makes sure).
    """
    factor = attention_factor(model)
    if factor == 1.0:
        return model.attention_scale
    return factor**2 * query_scale(model)


def _between(frequencies: Tensor, factor: float, share: Tensor) -> Tensor:
    """Stretched by the factor where the share is 1, and not where it is 0."""
    return share * frequencies / factor + (1 - share) * frequencies


def _llama3_share(model: ModelConfig, frequencies: Tensor) -> Tensor:
    assert model.rope_original_length is not None
    turns = model.rope_original_length * frequencies / (2 * math.pi)
    low, high = model.rope_low_freq_factor, model.rope_high_freq_factor
    return 1 - ((turns - low) / (high - low)).clamp(0, 1)


def _yarn_share(model: ModelConfig, num_channels: int) -> Tensor:
    assert model.rope_original_length is not None

    def pair_that_turns(times: float) -> float:
        period = model.rope_original_length / (2 * math.pi * times)  # type: ignore[operator]
        return num_channels * math.log(period) / (2 * math.log(model.rotary_base))

    first = max(math.floor(pair_that_turns(model.rope_beta_fast)), 0)
    last = min(math.ceil(pair_that_turns(model.rope_beta_slow)), num_channels - 1)
    steps = max(last - first, 0.001)
    return ((torch.arange(num_channels // 2, dtype=torch.float32) - first) / steps).clamp(0, 1)
