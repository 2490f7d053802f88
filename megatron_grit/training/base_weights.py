"""The frozen base of adapters, identified by a fingerprint of its weights.

A checkpoint of a run with adapters holds only what is trained. To resume or to use the model, the base is read again
from its source (``checkpoint.load`` or ``model.pretrained``). The fingerprint tells whether it is the same base; it
depends neither on the layout nor on the format of the weights.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_grit.config.schema import AdapterConfig, RunConfig
from megatron_grit.errors import CheckpointError, ConfigError
from megatron_grit.models.adapters import adapted_linears
from megatron_grit.models.adapters.quantization import quantize_linear_
from megatron_grit.models.decoder import GritDecoder
from megatron_grit.models.names import is_added
from megatron_grit.parallel.context import ParallelContext
from megatron_grit.training.checkpoint import Stage, base_state, read_config, saved_state, stage_chunks

_OF_VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight", "output_layer.bias")
_AT_ONCE = 1 << 22
"""Elements that are weighed at a time."""
_SAME_IN_BOTH = ("kind", "rank", "alpha", "rank_pattern", "alpha_pattern", "targets", "rslora")


def describe_base(config: RunConfig, fingerprint: str) -> dict[str, Any]:
    """What state.json says of the base of a run with adapters."""
    pretrained, load = config.model.pretrained, config.checkpoint.load
    if load is not None:
        return {"kind": "checkpoint", "source": str(Path(load).resolve()), "fingerprint": fingerprint}
    is_folder = pretrained is not None and Path(pretrained).is_dir()
    source = str(Path(pretrained).resolve()) if is_folder and pretrained is not None else pretrained
    return {"kind": "pretrained", "source": source, "fingerprint": fingerprint}


def check_base(path: Path, state: dict[str, Any], fingerprint: str) -> None:
    """Refuse adapters beside another base than theirs.

    Args:
        path: their checkpoint, for messages.
        state: its state.json.
        fingerprint: of the base at hand.

    Raises:
        CheckpointError: it is another base, or there are no adapters in it.
    """
    saved = state.get("base")
    if saved is None:
        raise CheckpointError(f"{path}: holds a whole model and no adapters; give it as checkpoint.load")
    if saved["fingerprint"] != fingerprint:
        raise CheckpointError(
            f"{path}: its adapters were trained beside the weights of {saved['source']} as they were then (fingerprint "
            f"{saved['fingerprint']}), and the base at hand has other ones ({fingerprint}); give checkpoint.load or "
            "model.pretrained the base that they were trained with"
        )


def check_same_adapter(path: Path, config: RunConfig) -> None:
    """Refuse adapters of another shape or scale than the configuration's.

    Raises:
        CheckpointError: names the key that differs.
    """
    saved = read_config(path).adapter
    for key in _SAME_IN_BOTH:
        before, now = getattr(saved, key), getattr(config.adapter, key)
        if before != now:
            raise CheckpointError(f"{path}: its adapters have adapter.{key} {before}, and this run has {now}")


def prepare_base(model: Stage, adapter: AdapterConfig) -> None:
    """Make what was just loaded the base of adapters: in 4 bits where that is asked for, and fresh magnitudes of DoRA
    are the lengths of its rows. Collective.

    Args:
        model: this process's stage.
        adapter: the configuration.

    Raises:
        ConfigError: a weight is to be quantised and trained.
    """
    for chunk in stage_chunks(model):
        for name, linear in adapted_linears(chunk).items():
            if adapter.quantize == "nf4":
                if linear.weight.requires_grad:
                    raise ConfigError(
                        f"adapter.quantize {adapter.quantize}: {name}.weight has an adapter and is named by "
                        "training.trainable; weights in 4 bits cannot be trained"
                    )
                quantize_linear_(linear, adapter.double_quantize)
            if adapter.kind == "dora":
                linear.adapter.reset_magnitudes(linear)


@torch.no_grad()
def base_fingerprint(model: Stage, context: ParallelContext, read: Callable[[str], Tensor] | None = None) -> str:
    """A fingerprint of the weights without adapters, embedding head and padding of the vocabulary: 16 hex digits.

    Every element, rounded to bf16, is weighed by a number that its name and place in the whole model decide, and all
    are added up modulo 2^64, each by one rank. So it is the same at any layout and compute precision. Collective.

    Args:
        model: this process's stage.
        context: this process's place in the mesh.
        read: gives a parameter's values by its name, where the model has no storage; one tensor after another.
    """
    total = torch.zeros((), dtype=torch.int64, device=context.device)
    for chunk in stage_chunks(model):
        total = total + _weigh_state(
            base_state([chunk], context), chunk, torch.bfloat16, context.device, read=read, with_added=False
        )
    dist.all_reduce(total)
    return f"{int(total) & (2**64 - 1):016x}"


@torch.no_grad()
def exact_fingerprint(model: Stage, context: ParallelContext) -> str:
    """A fingerprint of every bit of what a checkpoint holds of a model: all weights, or what is trained beside a base.
    The same at any layout: 16 hex digits. Collective. Arguments as for :func:`base_fingerprint`."""
    total = torch.zeros((), dtype=torch.int64, device=context.device)
    for chunk in stage_chunks(model):
        total = total + _weigh_state(saved_state([chunk], context), chunk, torch.float32, context.device)
    dist.all_reduce(total)
    return f"{int(total) & (2**64 - 1):016x}"


def _weigh_state(
    state: dict[str, Any],
    chunk: GritDecoder,
    dtype: torch.dtype,
    device: torch.device,
    *,
    read: Callable[[str], Tensor] | None = None,
    with_added: bool = True,
) -> Tensor:
    """This rank's share of the sum over a sharded state dict: int64 scalar on ``device``; the chunk may be on none."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import (
        ShardedTensor,
        ShardedTensorFactory,
        apply_factories,
        is_main_replica,
    )

    total = torch.zeros((), dtype=torch.int64, device=device)
    for name, entry in state.items():
        if not isinstance(entry, (ShardedTensor, ShardedTensorFactory)) or (is_added(entry.key) and not with_added):
            continue
        if read is not None:
            entry = replace(entry, data=read(name).view(entry.data.shape))
        part = {name: entry}
        apply_factories(part)  # a matrix that a checkpoint holds as two
        for shard in nested_values(part):
            if shard.data is not None and is_main_replica(shard.replica_id):
                total += _weigh(shard, chunk, dtype)
    return total


def _weigh(shard: Any, chunk: GritDecoder, dtype: torch.dtype) -> Tensor:
    """One shard's share of the sum: int64 scalar. Values are taken in ``dtype``."""
    values: Tensor = shard.data.detach()
    stacked = shard.prepend_axis_num
    offset, shape = shard.global_offset, shard.global_shape
    if shard.key in _OF_VOCABULARY:
        values = values[: max(0, chunk.num_tokens_in_vocab - offset[0])]
    # Only the rows of the vocabulary depend on the layout, and they come first: places do not depend on their number.
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    first = sum(start * stride for start, stride in zip(offset[:stacked], strides[:stacked], strict=True))
    rows = values.reshape(values.shape[0], -1)
    inner = torch.zeros(1, dtype=torch.int64, device=rows.device)
    for size, start, stride in zip(values.shape[1:], offset[stacked + 1 :], strides[stacked + 1 :], strict=True):
        places = (torch.arange(size, device=rows.device) + start) * stride
        inner = (inner[:, None] + places).flatten()
    key = int.from_bytes(hashlib.blake2b(shard.key.encode(), digest_size=8).digest(), signed=True)
    total = torch.zeros((), dtype=torch.int64, device=rows.device)
    step = max(1, _AT_ONCE // max(1, rows.shape[1]))
    for start in range(0, len(rows), step):
        block = rows[start : start + step]
        outer = (torch.arange(start, start + len(block), device=rows.device) + offset[stacked]) * strides[stacked]
        weights = (first + outer[:, None] + inner) * 0x9E3779B97F4A7C1 + key
        weights = (weights ^ (weights >> 29)) * 0xBF58476D1CE4E5B | 1
        bits = block.to(dtype).view(torch.int16 if dtype.itemsize == 2 else torch.int32)
        total += (bits.to(torch.int64) * weights).sum()
    return total
