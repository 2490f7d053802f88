"""Which part of a tensor a parameter of this process holds."""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_grit.convert.param_map import WHOLE, Shard
from megatron_grit.models.decoder import GritDecoder


def shard_of(chunk: GritDecoder, name: str, parameter: torch.nn.Parameter) -> Shard:
    """The part of a whole tensor that a parameter holds.

    Args:
        chunk: of this process.
        name: of the parameter in the chunk.
        parameter: with the engine's marks of how it is split.
    """
    if not getattr(parameter, "tensor_model_parallel", False):
        return WHOLE
    # Experts may be split over more or fewer ranks than all else.
    group = getattr(chunk.get_submodule(name.rpartition(".")[0]), "tp_group", None) or chunk.context.tensor_group
    return Shard(parameter.partition_dim, dist.get_rank(group), dist.get_world_size(group))  # type: ignore[attr-defined]
