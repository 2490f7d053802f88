"""Checks of a configuration that its types cannot express: ranges, sections that contradict each other, missing files.

Nothing here imports torch, so a launcher can run every check on a login node before it asks for devices.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path

from megatron_grit.config.blend import read_blend
from megatron_grit.config.checkpoint_folder import holds_checkpoint
from megatron_grit.config.checks.adapter import adapter_problems, trains_output_layer
from megatron_grit.config.checks.embedding import embedding_problems
from megatron_grit.config.checks.evaluation import evaluation_file_problems, evaluation_problems
from megatron_grit.config.checks.indexed import missing_file
from megatron_grit.config.checks.model import model_problems
from megatron_grit.config.checks.problem import Problem
from megatron_grit.config.checks.ranges import range_problems
from megatron_grit.config.checks.teacher import teacher_file_problems, teacher_problems
from megatron_grit.config.embedding_shape import num_head_parameters
from megatron_grit.config.kinds import kind_names, kind_options, kind_sources, made_by, trained_kinds
from megatron_grit.config.schema import RunConfig
from megatron_grit.config.shape import expert_width, num_query_groups
from megatron_grit.errors import ConfigError, MeshError
from megatron_grit.store.hub import is_hub_name

TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json")


def check(config: RunConfig, world_size: int, *, files: bool = True, origins: Mapping[str, str] | None = None) -> None:
    """Raise the first problem of a run.

    Args:
        config: what to run.
        world_size: number of processes.
        files: also look for the input files.
        origins: where keys were given ("file:line"), for the message; from ``parse_train_arguments``.

    Raises:
        MeshError: the layout does not fit the number of processes, the model or the batch.
        ConfigError: any other problem.
    """
    for error in find_errors(config, world_size, files=files, origins=origins):
        raise error


def find_errors(
    config: RunConfig, world_size: int, *, files: bool = True, origins: Mapping[str, str] | None = None
) -> list[ConfigError]:
    """All problems of a run as errors; arguments as of :func:`check`."""
    return as_errors(find_problems(config, world_size, files=files), origins)


def as_errors(problems: Iterable[Problem], origins: Mapping[str, str] | None = None) -> list[ConfigError]:
    """Problems as errors that say where the key was given; ``origins`` as of :func:`check`."""
    errors: list[ConfigError] = []
    for problem in problems:
        where = (origins or {}).get(problem.key)
        errors.append(problem.error(f"{where}: {problem.message}" if where else problem.message))
    return errors


def find_problems(config: RunConfig, world_size: int, *, files: bool = True) -> Iterator[Problem]:
    """All problems, the simplest first. A later one may follow from an earlier one."""
    for group in (range_problems(config), model_problems(config), _mesh(config, world_size)):
        found = list(group)
        yield from found
        if found:
            # What follows divides by these numbers, but for what looks at files.
            is_readable = not any(problem.key.startswith(("data.", "training.")) for problem in found)
            if files and is_readable and not list(_data(config)):
                yield from _files(config)
            return
    yield from _kinds(config, data_parallel_size(config, world_size))
    unreadable = list(_data(config))
    yield from unreadable
    yield from _validation(config)
    yield from _contrast(config)
    yield from embedding_problems(config)
    yield from adapter_problems(config)
    yield from teacher_problems(config)
    tasks = list(evaluation_problems(config))
    yield from tasks
    if files and not tasks:
        yield from evaluation_file_problems(config)
    if files and not any(problem.key.startswith("data.") for problem in unreadable):
        yield from _files(config)


def names_data(problem: Problem) -> bool:
    """Whether a problem may keep the data from being looked at."""
    sources = {kind_options(kind).DATA for kind in kind_names()}
    return problem.key in sources or problem.key.startswith(("data.", "training.", "embedding.", "model.max_position"))


def data_parallel_size(config: RunConfig, world_size: int) -> int:
    """Processes that hold the same piece of the model and see different data."""
    parallel = config.parallel
    return world_size // (parallel.tensor * parallel.pipeline * parallel.context)


def mesh_summary(config: RunConfig, world_size: int) -> str:
    """One line: "2 processes = tensor 1 x pipeline 1 x data 2 (expert 2)"."""
    parallel = config.parallel
    parts = [f"tensor {parallel.tensor}", f"pipeline {parallel.pipeline}"]
    if parallel.virtual_pipeline is not None:
        parts[-1] += f" ({parallel.virtual_pipeline} chunks a stage)"
    if parallel.context > 1:
        parts.append(f"context {parallel.context}")
    parts.append(f"data {data_parallel_size(config, world_size)}")
    noun = "process" if world_size == 1 else "processes"
    expert = f" (expert {parallel.expert})" if config.model.num_experts else ""
    return f"{world_size} {noun} = {' x '.join(parts)}{expert}"


def _mesh(config: RunConfig, world_size: int) -> Iterator[Problem]:
    parallel, model = config.parallel, config.model
    if parallel.context > 1 and model.attention_backend == "te":
        yield Problem(
            "model.attention_backend",
            "model.attention_backend te does not go with parallel.context above 1: it exchanges keys in another order; "
            "use auto or varlen",
        )
    model_size = parallel.tensor * parallel.pipeline * parallel.context
    if world_size % model_size:
        yield Problem(
            next(f"parallel.{name}" for name in ("pipeline", "tensor", "context") if getattr(parallel, name) > 1),
            f"the number of processes, {world_size}, is no multiple of tensor {parallel.tensor} x pipeline "
            f"{parallel.pipeline} x context {parallel.context}; start a multiple of {model_size} processes or change "
            "the mesh",
            MeshError,
        )
    groups = num_query_groups(model)
    for key, count, size in (
        ("model.num_attention_heads", model.num_attention_heads, "tensor"),
        ("model.num_query_groups", groups, "tensor"),
        ("model.ffn_hidden_size", model.ffn_hidden_size, "tensor"),
        ("model.moe_shared_ffn_hidden_size", model.moe_shared_ffn_hidden_size or 0, "tensor"),
        ("model.num_layers", model.num_layers, "pipeline"),
    ):
        parts = getattr(parallel, size)
        if count % parts:
            yield Problem(f"parallel.{size}", f"parallel.{size} {parts} does not divide {key} {count}", MeshError)
    if parallel.sequence_parallel and parallel.tensor == 1:
        yield Problem(
            "parallel.sequence_parallel", "parallel.sequence_parallel needs parallel.tensor above 1", MeshError
        )
    if parallel.virtual_pipeline is not None:
        yield from _virtual_pipeline(config, world_size // model_size)
    if parallel.overlap:
        yield from _overlap(config)
    yield from _expert_mesh(config, world_size // parallel.pipeline)


def _virtual_pipeline(config: RunConfig, data_size: int) -> Iterator[Problem]:
    parallel, num_layers = config.parallel, config.model.num_layers
    chunks = parallel.pipeline * (parallel.virtual_pipeline or 1)
    if parallel.pipeline == 1:
        yield Problem(
            "parallel.virtual_pipeline",
            f"parallel.virtual_pipeline {parallel.virtual_pipeline} needs parallel.pipeline above 1",
            MeshError,
        )
    elif num_layers % chunks:
        yield Problem(
            "parallel.virtual_pipeline",
            f"parallel.virtual_pipeline {parallel.virtual_pipeline} x parallel.pipeline {parallel.pipeline} does not "
            f"divide model.num_layers {num_layers}",
            MeshError,
        )
    kinds = len(trained_kinds(config))
    num_rows = kinds * (config.data.num_rows_multiple or data_size) // max(data_size, 1)
    if num_rows < parallel.pipeline:
        yield Problem(
            "parallel.virtual_pipeline",
            f"parallel.virtual_pipeline needs as many rows on a data parallel rank as parallel.pipeline "
            f"{parallel.pipeline}, and a step may have {num_rows}; set data.num_rows_multiple to "
            f"{-(-parallel.pipeline // kinds) * data_size}",
            MeshError,
        )


def _overlap(config: RunConfig) -> Iterator[Problem]:
    """Gradients are reduced once the last row of a step has reached every weight, so each must be reached."""
    embeds = {kind_options(kind).EMBEDS for kind in trained_kinds(config)}
    unused = None
    if False not in embeds and not config.model.tie_embeddings and trains_output_layer(config):
        unused = "the language-model head"
    if True not in embeds and num_head_parameters(config):
        unused = "the embedding head"
    if unused is not None:
        yield Problem(
            "parallel.overlap",
            "parallel.overlap needs a gradient for every weight, and training.objective "
            f"{config.training.objective} has none for {unused}; set parallel.overlap to false",
        )


def _expert_mesh(config: RunConfig, stage_size: int) -> Iterator[Problem]:
    """``stage_size``: processes of a pipeline stage, over which experts have a mesh of their own."""
    parallel, num_experts = config.parallel, config.model.num_experts
    if num_experts is None:
        for key, value in (("expert", parallel.expert), ("expert_tensor", parallel.expert_tensor or 1)):
            if value > 1:
                yield Problem(
                    f"parallel.{key}",
                    f"parallel.{key} {value} needs a mixture of experts; set model.num_experts",
                    MeshError,
                )
        return
    if parallel.tensor > 1 and not parallel.sequence_parallel:
        yield Problem(
            "parallel.tensor",
            "a mixture of experts with parallel.tensor above 1 needs parallel.sequence_parallel true",
            MeshError,
        )
    if num_experts % parallel.expert:
        yield Problem(
            "parallel.expert",
            f"parallel.expert {parallel.expert} does not divide model.num_experts {num_experts}",
            MeshError,
        )
    expert_tensor = parallel.expert_tensor or parallel.tensor
    width = expert_width(config.model)
    if width % expert_tensor:
        key = "ffn_hidden_size" if config.model.moe_ffn_hidden_size is None else "moe_ffn_hidden_size"
        message = f"parallel.expert_tensor {expert_tensor} does not divide model.{key} {width}"
        yield Problem("parallel.expert_tensor", message, MeshError)
    if stage_size % (parallel.expert * expert_tensor):
        yield Problem(
            "parallel.expert",
            f"parallel.expert {parallel.expert} x parallel.expert_tensor {expert_tensor} does not divide the "
            f"{stage_size} processes of a pipeline stage",
            MeshError,
        )


def _kinds(config: RunConfig, data_size: int) -> Iterator[Problem]:
    """Each data parallel rank needs a row of each kind, and each kind knows what its rows need."""
    multiple = config.data.num_rows_multiple or data_size
    if multiple % data_size:
        yield Problem(
            "data.num_rows_multiple",
            f"data.num_rows_multiple {multiple} is no multiple of the data parallel size {data_size}",
            MeshError,
        )
    for kind in trained_kinds(config):
        yield from kind_options(kind).problems(config, multiple)


def _contrast(config: RunConfig) -> Iterator[Problem]:
    knobs, width = config.loss, config.embedding.projection_dim or config.model.hidden_size
    if knobs.negatives == "hard":
        if config.data.train_group_size < 2:
            yield Problem("loss.negatives", "loss.negatives hard needs data.train_group_size of at least 2")
        for name in ("symmetric", "same_side_negatives"):
            if getattr(knobs, name):
                yield Problem(f"loss.{name}", f"loss.{name} compares texts of the batch, but loss.negatives is hard")
        if knobs.num_blocks > 1:
            yield Problem("loss.num_blocks", "loss.num_blocks has no effect with loss.negatives hard")
    if any(size > width for size in knobs.matryoshka_dims):
        yield Problem("loss.matryoshka_dims", f"loss.matryoshka_dims must be at most the embedding's width {width}")
    if knobs.grit_world_size is not None and knobs.emb_grad_scale != "grit":
        yield Problem("loss.grit_world_size", "loss.grit_world_size has an effect only with loss.emb_grad_scale grit")


def _validation(config: RunConfig) -> Iterator[Problem]:
    if config.data.valid:
        if all(kind_options(kind).EMBEDS for kind in trained_kinds(config)):
            yield Problem(
                "data.valid",
                "data.valid measures the loss of next tokens, which training.objective "
                f"{config.training.objective} does not train; leave it out",
            )
        return
    for name in ("valid_interval", "skip_train"):
        if getattr(config.training, name) and not (name == "skip_train" and config.evaluation.tasks):
            yield Problem(
                f"training.{name}", f"training.{name} measures the loss on data.valid; give the texts to measure it on"
            )


def _data(config: RunConfig) -> Iterator[Problem]:
    objective, data, kinds = config.training.objective, config.data, trained_kinds(config)
    for kind in kinds:
        key = kind_options(kind).DATA
        if not kind_sources(config, kind):
            others = [other for other in kinds if other != kind] or [other for other in kind_names() if other != kind]
            yield Problem(
                key,
                f"training.objective {objective} needs {key}: the prefix of a file made by {made_by(key)}; give "
                f"{key} or set training.objective to {' or '.join(others)}",
            )
        try:
            # A blend file is read here, so that the run fails before it asks for devices.
            read_blend(kind_sources(config, kind), key)
        except ConfigError as error:
            yield Problem(key, str(error))
            return
    yield from _held_out(config)
    if data.tokenizer is None:
        yield Problem("data.tokenizer", "data.tokenizer is not set; give the file or directory of the tokenizer")


def _held_out(config: RunConfig) -> Iterator[Problem]:
    key = "data.valid"
    trained: set[Path] = set()
    try:
        entries = read_blend(config.data.valid, key)
    except ConfigError as error:
        yield Problem(key, str(error))
        return
    for kind in trained_kinds(config):
        trained |= {Path(entry.path).resolve() for entry in read_blend(kind_sources(config, kind), key)}
    for entry in entries:
        if entry.weight or entry.epochs or entry.cap:
            yield Problem(key, f"{key}: {entry.path} has a weight, epochs or a cap, but each record is read once")
        if Path(entry.path).resolve() in trained:
            yield Problem(key, f"{key}: {entry.path} is trained on as well; give texts that are not")


def _files(config: RunConfig) -> Iterator[Problem]:
    data = config.data
    sources = {kind_options(kind).DATA: kind_sources(config, kind) for kind in trained_kinds(config)}
    for key, prefixes in (sources | {"data.valid": data.valid}).items():
        for entry in read_blend(prefixes, key):
            if (problem := missing_file(entry.path, made_by(key), data.tokenizer)) is not None:
                yield Problem(key, f"{key}: {problem}")
    if data.tokenizer is not None:
        tokenizer = Path(data.tokenizer)
        if not tokenizer.exists() and not is_hub_name(data.tokenizer):
            yield Problem("data.tokenizer", f"data.tokenizer: there is no file {tokenizer}")
        elif tokenizer.is_dir() and not any((tokenizer / name).is_file() for name in TOKENIZER_FILES):
            yield Problem("data.tokenizer", f"data.tokenizer: no {' or '.join(TOKENIZER_FILES)} in {tokenizer}")
    load = config.checkpoint.load
    if load is not None and not Path(load).is_dir() and not holds_checkpoint(load):
        yield Problem("checkpoint.load", f"checkpoint.load: there is no directory {load}")
    yield from teacher_file_problems(config)
    output = Path(config.output_dir)
    if output.exists() and not output.is_dir():
        yield Problem("output_dir", f"output_dir: {output} is a file, not a directory")
    there = next(folder for folder in (output, *output.absolute().parents) if folder.exists())
    if there.is_dir() and not os.access(there, os.W_OK | os.X_OK):
        yield Problem("output_dir", f"output_dir: {there} is not writable; give another output_dir")
    yield from _loggers(config)


def _loggers(config: RunConfig) -> Iterator[Problem]:
    """What writes the metrics has to be installed."""
    for key, package, wanted in (
        ("logging.tensorboard", "tensorboard", config.logging.tensorboard),
        ("logging.wandb_project", "wandb", config.logging.wandb_project is not None),
    ):
        if wanted and find_spec(package) is None:
            yield Problem(key, f"{key} needs the {package} package: pip install {package}")
