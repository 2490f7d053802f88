"""Models without storage: names, shapes and marks of their parameters, on the meta device."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from megatron_grit.config.schema import RunConfig
from megatron_grit.models.decoder import GritDecoder, build_model
from megatron_grit.parallel.context import ParallelContext


def build_without_storage(config: RunConfig, vocab_size: int, context: ParallelContext) -> GritDecoder:
    """The model with weights that have shapes and no memory."""
    meta = torch.device("meta")
    with meta, _WithoutStorage():
        return build_model(config, vocab_size, dataclasses.replace(context, device=meta))


class _WithoutStorage(TorchFunctionMode):
    """Put on the meta device what asks for another one: the engine's layers name theirs, whatever the default is."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("device") is not None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)
