"""Where Hugging Face's projections are in the engine's linear layers.

An engine's linear layer may hold several of them: linear_qkv holds q_proj, k_proj and v_proj, interleaved by query
group, and a gated linear_fc1 holds gate_proj and up_proj.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class PartLayout:
    """How the projections of a linear layer lie in its output on this rank: each of ``num_groups`` groups holds
    ``widths`` rows of them in turn."""

    names: tuple[str, ...]
    """Hugging Face's projections: q_proj ..."""
    widths: tuple[int, ...]
    """Rows of each in one group."""
    num_groups: int = 1
    """Query groups of linear_qkv; 1 elsewhere."""

    def split(self, rows: Tensor, dim: int) -> tuple[Tensor, ...]:
        """The projections' rows of a tensor, each in Hugging Face's order. ``dim``: of the rows, 0 or above."""
        grouped = rows.unflatten(dim, (self.num_groups, sum(self.widths)))
        return tuple(part.flatten(dim, dim + 1) for part in grouped.split(self.widths, dim + 1))

    def join(self, parts: Sequence[Tensor], dim: int) -> Tensor:
        """Inverse of :meth:`split`."""
        if len(parts) == 1:
            return parts[0]
        grouped = [part.unflatten(dim, (self.num_groups, -1)) for part in parts]
        return torch.cat(grouped, dim + 1).flatten(dim, dim + 1)


def part_layout(kind: str, linear: Any, engine_config: Any) -> PartLayout:
    """How Hugging Face's projections lie in a layer's output on this rank.

    Args:
        kind: the layer's name: linear_qkv, linear_proj, linear_fc1 or linear_fc2.
        linear: the layer.
        engine_config: its TransformerConfig.
    """
    if kind == "linear_proj":
        return PartLayout(("o_proj",), (linear.output_size,))
    if kind == "linear_fc2":
        return PartLayout(("down_proj",), (linear.output_size,))
    rows = linear.output_size_per_partition
    if kind == "linear_fc1":
        if engine_config.gated_linear_unit:
            return PartLayout(("gate_proj", "up_proj"), (rows // 2, rows // 2))
        return PartLayout(("up_proj",), (rows,))
    groups, channels = engine_config.num_query_groups, engine_config.kv_channels
    queries = engine_config.num_attention_heads // groups * channels
    return PartLayout(("q_proj", "k_proj", "v_proj"), (queries, channels, channels), rows // (queries + 2 * channels))
