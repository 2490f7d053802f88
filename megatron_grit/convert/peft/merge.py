"""A run with adapters as one model, the adapters merged into the base tensor by tensor; or as a PEFT adapter.

    merged = W + scaling * lora_B lora_A                                 LoRA
    merged = magnitude * (W + scaling * lora_B lora_A) / its row norms   DoRA

computed in fp32 and rounded to the base's dtype. W is the weight the adapter was trained with: for a run with
``adapter.quantize`` the weight dequantised from 4 bits, unless the original one is asked for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor

from megatron_grit.config.schema import ModelConfig, ParallelConfig
from megatron_grit.convert.families.registry import family_of_model
from megatron_grit.convert.hf_in.stored_model import open_model
from megatron_grit.convert.hf_out.exported import read_checkpoint
from megatron_grit.convert.hf_out.reader import CheckpointReader
from megatron_grit.convert.hf_out.words import write_words
from megatron_grit.convert.peft.base import locate_base
from megatron_grit.convert.peft.sites import Site, WholeAdapter, adapter_sites
from megatron_grit.convert.peft.writer import write_peft
from megatron_grit.errors import CheckpointError
from megatron_grit.models.adapters.quantization import round_trip
from megatron_grit.models.names import is_added
from megatron_grit.parallel.context import ParallelContext
from megatron_grit.parallel.launch import parallel_job
from megatron_grit.store.folder import OutputFolder
from megatron_grit.store.logs import get_logger
from megatron_grit.training.base_weights import base_fingerprint, check_base
from megatron_grit.training.checkpoint import (
    read_config,
    read_state,
    resolve_checkpoint,
)

log = get_logger(__name__)

Into = Literal["trained", "original"]


class Reader(Protocol):
    """Reads whole tensors by their names in the decoder, a few at a time."""

    shapes: Mapping[str, Tensor]
    """Every parameter, without storage."""
    dtype: torch.dtype
    """Of the weights."""

    @property
    def head_names(self) -> list[str]:
        """Parameters of the embedding head and of learned pooling."""
        ...

    def read(self, names: Iterable[str]) -> dict[str, Tensor]: ...


def has_adapters(path: Path) -> bool:
    """Whether a checkpoint holds adapters and not their base."""
    return "base" in read_state(path)


def merged_weight(
    weight: Tensor, site: Site, adapter: WholeAdapter, model: ModelConfig, quantize: Callable[[Tensor], Tensor] | None
) -> Tensor:
    """A linear layer's weight with its adapters merged, in the weight's dtype.

    Args:
        weight: whole, rows in the engine's order.
        site: the layer.
        adapter: the whole model's.
        quantize: what was done to a projection's weight before its adapter was trained. None: nothing.
    """
    merged = []
    for part, rows in zip(site.parts, site.split(weight, model), strict=True):
        factors = adapter.part(site.linear, part)
        base = rows.contiguous() if quantize is None else quantize(rows.contiguous())
        if not factors:
            merged.append(base)
            continue
        lora_A, lora_B = factors["lora_A"].float(), factors["lora_B"].float()
        result = torch.addmm(base.float(), lora_B, lora_A, alpha=adapter.scaling(site.linear, part))
        if "magnitude" in factors:
            result *= (factors["magnitude"].float() / result.norm(dim=1))[:, None]
        merged.append(result.to(weight.dtype))
    return site.join(merged, model)


class AdapterRun:
    """The checkpoint of a run with adapters.

    Raises:
        CheckpointError: it is damaged, or holds a whole model.
    """

    def __init__(self, path: Path, context: ParallelContext) -> None:
        self.path, self.config, self.state = path, read_config(path), read_state(path)
        if "base" not in self.state:
            raise CheckpointError(f"{path}: holds a whole model and no adapters")
        self.vocab_size = int(self.state["vocab_size"])
        self.model = dataclasses.replace(self.config.model, vocab_size=self.vocab_size)
        self.reader = CheckpointReader(path, self.config, self.vocab_size, context)
        trained = [name for name, parameter in self.reader.shapes.items() if parameter.requires_grad]
        factors = [name for name in trained if ".adapter." in name]
        self.adapter = WholeAdapter(self.config.adapter, self.reader.read(factors))
        self.trained = {name for name in trained if ".adapter." not in name and not is_added(name)}

    def save_peft(self, target: Path) -> Path:
        """Write it in PEFT's format."""
        weights = self.reader.read(sorted(self.trained))
        for name, kind, targets in family_of_model(self.model).outputs(self.model):
            if name in weights:
                self.adapter.trained |= dict(zip(targets, kind.megatron_to_hf(weights[name], self.model), strict=True))
        if self.reader.head_names:
            log.warning("PEFT has no place for the embedding head; only the decoder's adapters are written")
        return write_peft(target, self.adapter, self.model, str(self.state["base"]["source"]))


class MergedReader:
    """The base of a run with adapters; adapters are merged into each tensor as it is read.

    Args:
        run: the adapters.
        base: their base.
        into: trained: the base as during training, which ``adapter.quantize`` rounds to 4 bits; original: the base as
            stored.
    """

    def __init__(self, run: AdapterRun, base: Reader, into: Into) -> None:
        self._run, self._base = run, base
        self.shapes: Mapping[str, Tensor] = {
            name: shape for name, shape in run.reader.shapes.items() if ".adapter." not in name
        }
        self.dtype = run.reader.dtype
        self._sites = {f"{site.linear}.weight": site for site in adapter_sites(run.model)}
        settings = run.config.adapter
        self._quantize: Callable[[Tensor], Tensor] | None = None
        if settings.quantize == "nf4" and into == "trained":
            self._quantize = lambda rows: round_trip(rows, settings.double_quantize)

    @property
    def head_names(self) -> list[str]:
        return self._run.reader.head_names

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        wanted = list(names)
        own = self._run.trained | set(self.head_names)
        found = self._run.reader.read([name for name in wanted if name in own])
        found |= self._base.read([name for name in wanted if name not in own])
        return {name: self._merge(name, found[name].to(self.dtype)) for name in wanted}

    def _merge(self, name: str, tensor: Tensor) -> Tensor:
        site, adapter = self._sites.get(name), self._run.adapter
        # A layer without adapters is not in 4 bits either.
        if site is None or not any(adapter.part(site.linear, part) for part in site.parts):
            return tensor
        return merged_weight(tensor, site, adapter, self._run.model, self._quantize)


class HuggingFaceReader:
    """Reads a Hugging Face directory by the names of our tensors.

    Args:
        model: shape of the model to make, which may have more tokens.
        shapes: its parameters, without storage.
        dtype: of its weights.
    """

    def __init__(self, folder: Path, model: ModelConfig, shapes: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        self._model, self.shapes, self.dtype = model, shapes, dtype
        stored = open_model(folder, tied=model.tie_embeddings)
        stored.check()
        self._weights = stored.weights
        self._plan = {conversion.megatron: conversion for conversion in stored.plan}

    @property
    def head_names(self) -> list[str]:
        return []

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        return {name: self._plan[name].make(self._weights.stored, self._model).to(self.dtype) for name in names}


def open_merged(
    path: Path, context: ParallelContext, *, into: Into = "trained", base: str | Path | None = None
) -> MergedReader:
    """A reader of the merged model of a run with adapters.

    Args:
        into: see :class:`MergedReader`.
        base: where the base is now: a checkpoint or a Hugging Face directory. None: where the run read it.

    Raises:
        CheckpointError: a checkpoint is damaged, or the base is missing or not the run's.
    """
    run = AdapterRun(path, context)
    located = locate_base(path, base)
    shapes = {name: shape for name, shape in run.reader.shapes.items() if ".adapter." not in name}
    reader: Reader
    if located.is_huggingface:
        reader = HuggingFaceReader(located.path, run.model, shapes, run.reader.dtype)
    else:
        found = resolve_checkpoint(located.path)
        reader = CheckpointReader(found, read_config(found), int(read_state(found)["vocab_size"]), context)
    fingerprint = base_fingerprint([run.reader.skeleton], context, lambda name: reader.read([name])[name])
    check_base(path, run.state, fingerprint)
    return MergedReader(run, reader, into)


def export_adapter(source: str | Path, target: str | Path) -> Path:
    """Write the adapters of a run as a directory that PEFT loads onto the exported base, with the tokenizer and the
    chat template.

    Args:
        source: a checkpoint of a run with adapters, or the run's output directory.
        target: directory to write; not there yet.

    Raises:
        CheckpointError: the checkpoint is damaged or has no adapters, or PEFT has no form for it.
        OutputError: the target is not empty, another process is writing it, or there is no room.
    """
    path = resolve_checkpoint(source)
    with (
        OutputFolder(Path(target), ["adapter", str(path.resolve())]) as folder,
        parallel_job(ParallelConfig(device="cpu"), seed=0) as context,
    ):
        run = AdapterRun(path, context)
        with folder.naming(folder.path):
            run.save_peft(folder.path)
        # As trainers do: whoever loads the adapters asks in the words that they were trained in.
        write_words(folder.path, read_checkpoint(path, None))
        folder.publish()
    return Path(target)
