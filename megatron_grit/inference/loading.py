"""A decoder with its weights, from a checkpoint of ours or a Hugging Face folder, on any mesh."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist

from megatron_grit.config.checkpoint_folder import holds_checkpoint
from megatron_grit.config.checks.run import find_problems
from megatron_grit.config.knob import value_problem
from megatron_grit.config.schema import EmbeddingConfig, ParallelConfig, RunConfig, TrainingConfig
from megatron_grit.convert.hf_in.convert import check_tokenizer
from megatron_grit.convert.hf_in.embedder import embedder_defaults
from megatron_grit.convert.hf_in.pretrained import load_pretrained, pretrained_folder
from megatron_grit.convert.hf_in.stored_model import open_model
from megatron_grit.convert.peft.checkpoint import load_checkpoint
from megatron_grit.data.text.tokenizer import Tokenizer, load_tokenizer
from megatron_grit.errors import CheckpointError, ConfigError, MeshError
from megatron_grit.models.decoder import GritDecoder, build_model
from megatron_grit.parallel.launch import initialize
from megatron_grit.store.environment import job_size
from megatron_grit.training.checkpoint import read_config, read_state, resolve_checkpoint, tokenizer_path


class LoadedModel(NamedTuple):
    """A decoder, or this process's part of it, and what belongs to it."""

    config: RunConfig
    decoder: GritDecoder
    tokenizer: Tokenizer
    folder: Path
    """The checkpoint or Hugging Face folder that was read."""


def model_folder(path: str | Path) -> Path:
    """The folder that a model is read from: a checkpoint, the newest one of a run, or a Hugging Face folder.

    Raises:
        CheckpointError: there is no model.
    """
    if _is_hugging_face(path):
        return pretrained_folder(str(path))
    return resolve_checkpoint(path)


def load_decoder(
    path: str | Path, device: str, precision: str | None, base: str | Path | None, parallel: ParallelConfig | None
) -> LoadedModel:
    """Load a model; arguments and errors as of :meth:`megatron_grit.inference.model.GritModel.load`."""
    check_value("device", ParallelConfig, device)
    if precision is not None:
        check_value("precision", TrainingConfig, precision)
    if _is_hugging_face(path):
        return _from_hugging_face(path, device, precision, base, parallel)
    path = resolve_checkpoint(path)
    state, config = read_state(path), read_config(path)
    tokenizer_file = tokenizer_path(path)
    if tokenizer_file is None:
        raise CheckpointError(f"{path}: holds no tokenizer.model or tokenizer.json")
    tokenizer = load_tokenizer(tokenizer_file)
    model = _build(config, device, precision, parallel, int(state["vocab_size"]))
    load_checkpoint(path, config, [model], model.context, base)
    return LoadedModel(config, model.eval(), tokenizer, path)


def _is_hugging_face(path: str | Path) -> bool:
    return not holds_checkpoint(path) and (Path(path) / "config.json").is_file()


def _from_hugging_face(
    path: str | Path, device: str, precision: str | None, base: str | Path | None, parallel: ParallelConfig | None
) -> LoadedModel:
    if base is not None:
        raise ConfigError(f"{path} is a whole model of Hugging Face; base is for a run with adapters, leave it out")
    folder = pretrained_folder(str(path))
    with open_model(folder) as stored:
        config = RunConfig(model=replace(stored.shape, pretrained=str(folder)))
        config.training.precision = stored.check()  # type: ignore[assignment]
    config.embedding = EmbeddingConfig(**embedder_defaults(folder))
    tokenizer = load_tokenizer(folder)
    check_tokenizer(tokenizer, config.model)
    assert config.model.vocab_size is not None
    model = _build(config, device, precision, parallel, config.model.vocab_size)
    load_pretrained(config, [model], model.context, checked=True)
    return LoadedModel(config, model.eval(), tokenizer, folder)


def _build(
    config: RunConfig, device: str, precision: str | None, parallel: ParallelConfig | None, vocab_size: int
) -> GritDecoder:
    """The decoder on this job's mesh, with fresh weights."""
    config.parallel = replace(parallel or ParallelConfig(), device=device)  # type: ignore[arg-type]
    if parallel is not None:
        fit_mesh(config)
    context = initialize(config.parallel, config.training.seed, "device")
    config.training.precision = precision or (  # type: ignore[assignment]
        "fp32" if context.device.type == "cpu" else config.training.precision
    )
    return build_model(config, vocab_size, context)


def check_value(name: str, cls: type, value: object) -> None:
    """
    Raises:
        ConfigError: the value is none of the option of this name.
    """
    if (problem := value_problem(cls, name, value)) is not None:
        raise ConfigError(f"{name} {problem}")


def fit_mesh(config: RunConfig) -> None:
    """Adjust settings that depend on the mesh to the mesh of this job.

    Raises:
        MeshError: the mesh does not fit the model or the number of processes.
    """
    parallel, model = config.parallel, config.model
    if parallel.virtual_pipeline is not None:
        raise MeshError("parallel.virtual_pipeline is of training; leave it out")
    if model.num_experts is not None and parallel.tensor > 1:
        parallel.sequence_parallel = True
    if parallel.context > 1 and model.attention_backend == "te":
        model.attention_backend = "auto"
    world_size = dist.get_world_size() if dist.is_initialized() else job_size()
    for problem in find_problems(config, world_size, files=False):
        if problem.key.startswith("parallel."):
            raise problem.error(problem.message)
