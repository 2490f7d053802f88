"""The weights that a run starts from: finite, and equal where ranks hold the same."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_grit.models.decoder import GritDecoder
from megatron_grit.parallel.context import ParallelContext
from megatron_grit.training.checkpoint import model_state

_WORDS = 1024
"""64-bit words that are summed before their sum is weighed."""


def find_nonfinite(chunks: Sequence[GritDecoder]) -> str | None:
    """The first weight of this rank that holds a NaN or an infinity, in words."""
    named = [pair for chunk in chunks for pair in chunk.named_parameters()]
    if not named:
        return None
    extremes = torch.stack([torch.stack(torch.aminmax(parameter.detach())).float() for _, parameter in named])
    finite = extremes.isfinite().all(1).tolist()  # one wait for the device
    bad = [name for (name, _), is_finite in zip(named, finite, strict=True) if not is_finite]
    more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
    return f"the weight {bad[0]}{more} is not finite" if bad else None


def find_unequal_replicas(chunks: Sequence[GritDecoder], context: ParallelContext) -> str | None:
    """A weight that this rank has otherwise than another rank that should hold the same, in words.

    Which ranks should is read from the names and offsets by which a checkpoint puts the model together: data and
    context parallel replicas, what tensor parallel ranks do not split, experts on all ranks that have them, and a
    word embedding that the last stage has as well. Collective over the job.
    """
    if context.world_size == 1:
        return None
    shards = _shards(chunks, context)
    keys = [int.from_bytes(hashlib.blake2b(place.encode(), digest_size=8).digest(), signed=True) for place in shards]
    own = torch.tensor(keys, dtype=torch.int64, device=context.device)
    digests = torch.stack([digest(values) for _, values in shards.values()])
    tables = _gather_tables(torch.stack([own, digests], dim=1), context)
    names = dict(zip(keys, (name for name, _ in shards.values()), strict=True))
    mine = dict(tables[context.rank])
    for rank, table in enumerate(tables):
        for key, value in table:
            if key in mine and mine[key] != value:
                return f"the weight {names[key]} is not that of rank {rank}, which should hold the same"
    return None


def digest(values: Tensor) -> Tensor:
    """Sum of a tensor's bytes, in words that are weighed by their place: int64 scalar. Reads the memory once."""
    raw = values.detach().contiguous().flatten().view(torch.uint8)
    if raw.storage_offset() % 8:
        raw = raw.clone()
    whole = raw.numel() // (8 * _WORDS) * 8 * _WORDS
    sums = raw[:whole].view(torch.int64).view(-1, _WORDS).sum(1)
    terms = torch.cat([sums, raw[whole:].to(torch.int64)])
    places = torch.arange(1, len(terms) + 1, device=raw.device)
    return (terms * (places * 0x9E3779B97F4A7C1 + 1)).sum()


def _shards(chunks: Sequence[GritDecoder], context: ParallelContext) -> dict[str, tuple[str, Tensor]]:
    """This rank's weights, with their names, by place in the whole model: what has the same place is the same."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    found: dict[str, tuple[str, Tensor]] = {}
    for chunk in chunks:
        for name, entry in model_state([chunk], context).items():
            parts = {name: entry}
            apply_factories(parts)  # a matrix that a checkpoint holds as two
            for shard in nested_values(parts):
                if isinstance(shard, ShardedTensor) and shard.data is not None:
                    found[f"{shard.key} {shard.global_offset} {tuple(shard.data.shape)}"] = (name, shard.data)
    return found


def _gather_tables(table: Tensor, context: ParallelContext) -> list[list[tuple[int, int]]]:
    """Rows of two numbers from every rank."""
    size = torch.tensor([len(table)], device=table.device)
    sizes = [torch.empty_like(size) for _ in range(context.world_size)]
    dist.all_gather(sizes, size)
    counts = [int(size.item()) for size in sizes]
    padded = table.new_zeros(max(counts), 2)
    padded[: len(table)] = table
    gathered = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(gathered, padded)
    pairs = [part[:count].tolist() for part, count in zip(gathered, counts, strict=True)]
    return [[(key, value) for key, value in rows] for rows in pairs]
