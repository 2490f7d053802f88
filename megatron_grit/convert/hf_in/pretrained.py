"""Training that starts from a Hugging Face directory (``model.pretrained``): its shape, its tokenizer, its weights.

Each rank reads only its own shards: about 1 / (tensor x pipeline x expert parallel size) of the weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from megatron_grit.config.checkpoint_folder import holds_checkpoint
from megatron_grit.config.schema import ModelConfig, RunConfig
from megatron_grit.config.shape import effective
from megatron_grit.convert.families.registry import load_hf_config, same_value
from megatron_grit.convert.hf_in.convert import check_tokenizer, grown_vocabulary
from megatron_grit.convert.hf_in.embedder import decoder_folder, embedder_defaults
from megatron_grit.convert.hf_in.reader import WeightFolder
from megatron_grit.convert.hf_in.stored_model import open_model, stored_shape
from megatron_grit.convert.param_map import Conversion
from megatron_grit.convert.shards import shard_of
from megatron_grit.data.text.tokenizer import BESIDE_TOKENIZER, load_tokenizer
from megatron_grit.errors import CheckpointError, ConfigError
from megatron_grit.models.adapters import global_name
from megatron_grit.models.decoder import GritDecoder
from megatron_grit.models.names import is_added
from megatron_grit.parallel.collectives import any_rank
from megatron_grit.parallel.context import ParallelContext
from megatron_grit.store.files import replacing
from megatron_grit.store.hub import local_folder
from megatron_grit.store.logs import get_logger
from megatron_grit.training.checkpoint import list_checkpoints, read_config, tokenizer_path
from megatron_grit.training.teacher.source import TeacherSource
from megatron_grit.training.trainer import InitialWeights

log = get_logger(__name__)


def resolve_pretrained(config: RunConfig, origins: Mapping[str, str], *, files: bool = True) -> RunConfig:
    """Fill in what ``model.pretrained`` decides. A configuration without it is returned unchanged.

    A run that resumes from a checkpoint no longer needs the directory: if it is gone, shape and tokenizer come from the
    checkpoint.

    Args:
        config: as it was parsed.
        origins: where keys were given ("file:line"), from ``parse_train_arguments``.
        files: also compare the weights' names, types and shapes with config.json, and the tokenizer with the model.

    Raises:
        ConfigError: a key was given another value than config.json has; names both, and where it was given.
        CheckpointError: the directory cannot be used; names the file and tensor.
    """
    given = config.model.pretrained
    if given is None:
        return config
    if config.checkpoint.load is not None:
        raise ConfigError(f"model.pretrained {given} and checkpoint.load {config.checkpoint.load}: give one of them")
    checkpoints = list_checkpoints(config.output_dir) if config.checkpoint.resume else []
    try:
        folder = pretrained_folder(given, weights=files and not checkpoints)
        shape = load_hf_config(folder) if checkpoints else stored_shape(folder, weights=files)
        tokenizer: Path | None = folder
        found = embedder_defaults(folder)
    except CheckpointError:
        if not checkpoints:
            raise
        saved = read_config(checkpoints[-1])
        shape, found, folder = saved.model, vars(saved.embedding), Path(given)
        tokenizer = _keep_tokenizer(checkpoints[-1], config.output_dir) if files else tokenizer_path(checkpoints[-1])
    if checkpoints:
        shape = replace(shape, tie_embeddings=read_config(checkpoints[-1]).model.tie_embeddings)
    model = _merge(shape, config.model, origins, given)
    data = config.data
    if data.tokenizer is None or (Path(data.tokenizer) == folder and not Path(data.tokenizer).exists()):
        data = replace(data, tokenizer=None if tokenizer is None else str(tokenizer))
    silent = {name: value for name, value in found.items() if f"embedding.{name}" not in origins}
    resolved = replace(config, model=model, data=data, embedding=replace(config.embedding, **silent))
    if files and data.tokenizer is not None:
        check_tokenizer(load_tokenizer(data.tokenizer), model)
    if files and not checkpoints:
        with open_model(folder, tied=model.tie_embeddings) as stored:
            stored.check()
    return resolved


def pretrained_weights(config: RunConfig) -> InitialWeights | None:
    """The function that fills the weights of a new run from ``model.pretrained``; None without it.

    ``config`` comes from :func:`resolve_pretrained`.
    """
    if config.model.pretrained is None:
        return None

    def fill(chunks: Sequence[GritDecoder], context: ParallelContext) -> None:
        problem: CheckpointError | None = None
        try:
            load_pretrained(config, chunks, context, checked=True)
        except CheckpointError as error:
            problem = error
        if any_rank(problem is not None, context):
            raise problem or CheckpointError(f"{config.model.pretrained}: cannot be read; another rank says why")

    return fill


def pretrained_teacher(config: RunConfig) -> TeacherSource | None:
    """The teacher of a run whose ``loss.teacher.model`` is a Hugging Face model; None where it is not.

    Raises:
        CheckpointError: the directory cannot be used.
    """
    source = config.loss.teacher.model
    if source is None or holds_checkpoint(source):
        return None
    folder = pretrained_folder(source)
    shape = replace(stored_shape(folder), pretrained=source)

    def fill(chunks: Sequence[GritDecoder], context: ParallelContext) -> None:
        load_pretrained(replace(config, model=shape), chunks, context)

    return TeacherSource(name=source, model=shape, tokenizer=folder, fill=fill)


def load_pretrained(
    config: RunConfig, chunks: Sequence[GritDecoder], context: ParallelContext, *, checked: bool = False
) -> int:
    """Fill the weights of this process's chunks. Adapters, what reads neighbors, and an embedding head that is not that
    of a reward model keep their values.

    Args:
        config: with ``model.pretrained``.
        chunks: of this process's stage, without DDP wrappers.
        checked: :func:`resolve_pretrained` has compared types and shapes already.

    Returns:
        Bytes that were read.

    Raises:
        CheckpointError: a file cannot be read; names it.
    """
    source = config.model.pretrained
    assert source is not None
    folder = pretrained_folder(source)
    with open_model(folder, tied=config.model.tie_embeddings) as stored:
        if not checked:
            stored.check()
        fill_chunks(chunks, config.model, stored.plan, stored.weights)
        num_bytes = stored.weights.bytes_read
        log.info(f"started from the weights of {source}; rank {context.rank} read {num_bytes / 1e6:,.1f} MB")
        return num_bytes


def fill_chunks(
    chunks: Sequence[GritDecoder], model: ModelConfig, plan: Sequence[Conversion], weights: WeightFolder
) -> None:
    """Fill parameters with their shards of the converted tensors. Each shard is read once.

    Args:
        model: shape of the model, which may have more tokens than the source.
    """
    conversions = {conversion.megatron: conversion for conversion in plan}
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            conversion = conversions.get(global_name(chunk, name))
            if ".adapter." in name or (is_added(name) and (conversion is None or parameter.shape[0] != 1)):
                continue
            assert conversion is not None, name
            made = conversion.make(weights.stored, model, shard_of(chunk, name, parameter))
            assert made.shape == parameter.shape, f"{name}: {list(made.shape)} for {list(parameter.shape)}"
            with torch.no_grad():
                parameter.copy_(made)


def pretrained_folder(source: str, *, weights: bool = True) -> Path:
    """The directory of a Hugging Face model: ``source`` itself, or a copy of "organisation/name@revision".

    Args:
        source: as ``model.pretrained``.
        weights: whether they are needed, too.

    Raises:
        CheckpointError: there is none.
    """
    return decoder_folder(local_folder(source, weights=weights))


def _merge(shape: ModelConfig, given: ModelConfig, origins: Mapping[str, str], source: str) -> ModelConfig:
    """The shape of the weights, overridden by given keys that may differ from it."""
    changes: dict[str, Any] = {"pretrained": source, "retro": given.retro}
    for field in fields(ModelConfig):
        name = field.name
        where = origins.get(f"model.{name}")
        if where is None:
            continue
        ours, theirs = getattr(given, name), getattr(shape, name)
        if not field.metadata.get("in_weights", True):
            changes[name] = ours
        elif name == "vocab_size":
            changes[name] = grown_vocabulary(shape, ours, source)
        elif name == "max_position_embeddings" and ours < theirs and shape.position_embedding == "rope":
            changes[name] = ours
        elif not same_value(effective(replace(shape, **{name: ours}), name), effective(shape, name)):
            raise ConfigError(
                f"{where}: model.{name} is {ours}, but {source} has {theirs}; leave it out, or start without "
                "model.pretrained"
            )
    return replace(shape, **changes)


def _keep_tokenizer(checkpoint: Path, output_dir: str) -> Path | None:
    """Copy a checkpoint's tokenizer to ``output_dir``: old checkpoints are removed as new ones are written."""
    found = tokenizer_path(checkpoint)
    if found is None:
        return None
    for name in (found.name, *BESIDE_TOKENIZER):
        source, kept = checkpoint / name, Path(output_dir) / name
        if source.is_file() and (not kept.exists() or kept.read_bytes() != source.read_bytes()):
            with replacing(kept, "wb") as file:
                file.write(source.read_bytes())
    return Path(output_dir) / found.name
