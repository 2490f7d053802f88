"""Loads any checkpoint: a whole model, or adapters together with their base."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from megatron_grit.config.schema import RunConfig
from megatron_grit.convert.hf_in.pretrained import load_pretrained
from megatron_grit.convert.peft.base import locate_base
from megatron_grit.errors import CheckpointError
from megatron_grit.models.decoder import GritDecoder
from megatron_grit.parallel.context import ParallelContext
from megatron_grit.training.base_weights import base_fingerprint, check_base, prepare_base
from megatron_grit.training.checkpoint import load_adapters, load_weights, read_state, resolve_checkpoint
from megatron_grit.training.megatron_checkpoint import find_megatron_checkpoint


def load_checkpoint(
    path: Path,
    config: RunConfig,
    model: list[GritDecoder],
    context: ParallelContext,
    base: str | Path | None = None,
) -> None:
    """Load a model's weights from a checkpoint of any layout. Collective over all ranks.

    Args:
        config: the configuration of the model: the checkpoint's, except for layout and precision.
        model: this process's chunks.
        base: for a run with adapters, where their base is now: a checkpoint or a Hugging Face directory. None: where
            the run read it.

    Raises:
        CheckpointError: a file is missing or damaged, or the base is not the one the adapters were trained with.
    """
    state = read_state(path)
    if "base" not in state:
        if base is not None:
            raise CheckpointError(f"{path}: holds a whole model and no adapters; it needs no base")
        load_weights(path, model, context)
        return
    found = locate_base(path, base)
    if found.is_huggingface:
        load_pretrained(replace(config, model=replace(config.model, pretrained=str(found.path))), model, context)
    else:
        load_weights(find_megatron_checkpoint(found.path) or resolve_checkpoint(found.path), model, context)
    check_base(path, state, base_fingerprint(model, context))
    prepare_base(model, config.adapter)
    load_adapters(path, model, context)
