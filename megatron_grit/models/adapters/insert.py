"""Adapters put beside the linear layers of a model, with fresh weights that do not depend on the layout."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_grit.config.adapter_shape import projection_name, rank_of, scaling_of
from megatron_grit.config.checks.adapter import adapter_targets
from megatron_grit.config.schema import AdapterConfig, RunConfig
from megatron_grit.models.adapters.layout import PartLayout, part_layout
from megatron_grit.models.adapters.lora import AdaptedLinear, LoraAdapter, LoraPart, attach
from megatron_grit.models.adapters.names import global_name
from megatron_grit.models.adapters.split import Split

_LINEARS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")


def insert_adapters(model: Any, config: RunConfig) -> None:
    """Give the linear layers of a chunk the adapters that the configuration asks for.

    ``lora_A`` is drawn as PEFT draws it, uniform within 1 / sqrt(input width), for the whole layer from
    ``training.seed`` and the layer's name, and then cut; ``lora_B`` is zero, so the model's output is what it was.

    Args:
        model: a chunk (:class:`~megatron_grit.models.decoder.GritDecoder`), on the CPU or a device.
        config: the run.
    """
    targets = adapter_targets(config)
    for name, linear in list(model.decoder.named_modules(prefix="decoder")):
        if name.rpartition(".")[2] not in _LINEARS:
            continue
        layout = part_layout(name.rpartition(".")[2], linear, model.config)
        adapted = [part for part in layout.names if part in targets]
        if adapted:
            split, whole = Split.of_linear(linear), global_name(model, name)
            seed = f"{config.training.seed} {whole}"
            parts = {
                part: _fresh_part(linear, layout, projection_name(whole, part), config.adapter, split, f"{seed} {part}")
                for part in adapted
            }
            allreduce = getattr(linear.weight, "allreduce", True)
            attach(linear, LoraAdapter(layout, parts, config.adapter.dropout, split, allreduce))


def _fresh_part(
    linear: Any, layout: PartLayout, name: str, adapter: AdapterConfig, split: Split, seed: str
) -> LoraPart:
    whole = _draw(rank_of(adapter, name), linear.input_size, seed)
    axis = split.axis_of("lora_A")
    if axis is not None:
        whole = whole.chunk(split.size, axis)[dist.get_rank(split.group)]
    lora_A = whole.to(linear.weight.device, linear.config.params_dtype, copy=True).contiguous()
    num_rows = layout.num_groups * layout.widths[layout.names.index(name.rpartition(".")[2])]
    return LoraPart(lora_A, num_rows, scaling_of(adapter, name), adapter.kind == "dora", split)


def _draw(rank: int, width: int, seed: str) -> Tensor:
    """Kaiming's uniform distribution with a = sqrt(5), as of torch.nn.Linear: fp32 [rank, width]."""
    digest = hashlib.blake2b(seed.encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    return torch.empty(rank, width).uniform_(-1 / math.sqrt(width), 1 / math.sqrt(width), generator=generator)


@contextmanager
def adapters_off(chunks: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Within it the chunks are the base of their adapters; nothing changes for chunks without."""
    adapters = [linear.adapter for chunk in chunks for linear in adapted_linears(chunk).values()]
    for adapter in adapters:
        adapter.is_on = False
    try:
        yield
    finally:
        for adapter in adapters:
            adapter.is_on = True


def adapted_linears(model: torch.nn.Module) -> dict[str, AdaptedLinear]:
    """Layers of a chunk that have an adapter, by their names in the chunk."""
    return {name: module for name, module in model.named_modules() if isinstance(module, AdaptedLinear)}
