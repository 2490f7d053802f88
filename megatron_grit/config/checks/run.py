"""Checks of a configuration that its types cannot express: ranges, sections that contradict each other, missing files.

Nothing here imports torch, so a launcher can run every check on a login node before it asks for devices.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from megatron_grit.config.blend import BlendEntry, read_blend
from megatron_grit.config.checks.adapter import adapter_problems, trains_output_layer
from megatron_grit.config.checks.embedding import embedding_problems
from megatron_grit.config.checks.model import model_problems
from megatron_grit.config.checks.problem import Problem
from megatron_grit.config.checks.ranges import range_problems
from megatron_grit.config.embedding_shape import num_head_parameters
from megatron_grit.config.schema import RunConfig
from megatron_grit.config.shape import expert_width, num_query_groups
from megatron_grit.errors import ConfigError, MeshError

INDEXED_SUFFIXES = (".idx", ".bin", ".json")
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
    for problem in find_problems(config, world_size, files=files):
        where = (origins or {}).get(problem.key)
        raise problem.error(f"{where}: {problem.message}" if where else problem.message)


def find_problems(config: RunConfig, world_size: int, *, files: bool = True) -> Iterator[Problem]:
    """All problems, the simplest first. A later one may follow from an earlier one."""
    for group in (range_problems(config), model_problems(config), _mesh(config, world_size)):
        found = list(group)
        yield from found
        if found:
            # What follows divides by these numbers.
            return
    yield from _batches(config, data_parallel_size(config, world_size))
    yield from _data(config)
    yield from _contrast(config)
    yield from embedding_problems(config)
    yield from adapter_problems(config)
    if files:
        yield from _files(config)


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
    kinds = 2 if config.training.objective == "unified" else 1
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
    objective = config.training.objective
    unused = None
    if objective == "embedding" and not config.model.tie_embeddings and trains_output_layer(config):
        unused = "the language-model head"
    if objective == "generative" and num_head_parameters(config):
        unused = "the embedding head"
    if unused is not None:
        yield Problem(
            "parallel.overlap",
            f"parallel.overlap needs a gradient for every weight, and training.objective {objective} has none for "
            f"{unused}; set parallel.overlap to false",
        )


def _expert_mesh(config: RunConfig, stage_size: int) -> Iterator[Problem]:
    """``stage_size``: processes of a pipeline stage, over which its experts are laid out anew."""
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


def _batches(config: RunConfig, data_size: int) -> Iterator[Problem]:
    """Each data parallel rank needs a row of each kind, and a row needs a text."""
    training, data = config.training, config.data
    multiple = data.num_rows_multiple or data_size
    if multiple % data_size:
        yield Problem(
            "data.num_rows_multiple",
            f"data.num_rows_multiple {multiple} is no multiple of the data parallel size {data_size}",
            MeshError,
        )
    texts = training.embedding_batch_size * (1 + data.train_group_size)
    if training.objective != "generative" and texts < multiple:
        yield Problem(
            "training.embedding_batch_size",
            f"training.embedding_batch_size {training.embedding_batch_size} gives {texts} texts, fewer than the "
            f"{multiple} rows of a step",
            MeshError,
        )
    if training.objective != "embedding":
        yield from _generative_batch(config, multiple)
    loss = config.loss
    if loss.grit_world_size is not None and loss.emb_grad_scale != "grit":
        yield Problem("loss.grit_world_size", "loss.grit_world_size has an effect only with loss.emb_grad_scale grit")


def _generative_batch(config: RunConfig, multiple: int) -> Iterator[Problem]:
    training = config.training
    if config.data.packing == "step":
        if training.generative_batch_size < multiple:
            yield Problem(
                "training.generative_batch_size",
                f"training.generative_batch_size {training.generative_batch_size} is below the {multiple} rows of a "
                "step",
                MeshError,
            )
        if training.generative_rows is not None:
            yield Problem(
                "training.generative_rows", "training.generative_rows has an effect only with data.packing window"
            )
    elif training.generative_rows is None:
        yield Problem(
            "data.packing", "data.packing window needs training.generative_rows: the generative rows of a step"
        )
    elif training.generative_rows % multiple:
        yield Problem(
            "training.generative_rows",
            f"training.generative_rows {training.generative_rows} is no multiple of {multiple}, the data parallel size "
            "or data.num_rows_multiple",
            MeshError,
        )


def _blend(config: RunConfig, kind: str) -> list[BlendEntry]:
    return read_blend(getattr(config.data, kind), f"data.{kind}")


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
    if config.training.objective != "generative" and config.training.embedding_batch_size % knobs.num_blocks:
        yield Problem(
            "loss.num_blocks",
            f"training.embedding_batch_size {config.training.embedding_batch_size} cannot be cut into "
            f"{knobs.num_blocks} blocks of equal size (loss.num_blocks)",
        )
    if any(not 0 < size <= width for size in knobs.matryoshka_dims):
        yield Problem("loss.matryoshka_dims", f"loss.matryoshka_dims must be from 1 to the embedding's width {width}")


def _data(config: RunConfig) -> Iterator[Problem]:
    objective, data = config.training.objective, config.data
    for kind, other in (("embedding", "generative"), ("generative", "embedding")):
        if objective != other and not getattr(data, kind):
            yield Problem(
                f"data.{kind}",
                f"training.objective {objective} needs data.{kind}: the prefix of a file made by "
                f"tools/preprocess/build_grit.py; give data.{kind} or set training.objective to {other}",
            )
        if objective != other:
            # A blend file is read here, so that the run fails before it asks for devices.
            try:
                _blend(config, kind)
            except ConfigError as error:
                yield Problem(f"data.{kind}", str(error))
                return
    if data.tokenizer is None:
        yield Problem("data.tokenizer", "data.tokenizer is not set; give the file or directory of the tokenizer")


def _files(config: RunConfig) -> Iterator[Problem]:
    objective, data = config.training.objective, config.data
    for kind, other in (("embedding", "generative"), ("generative", "embedding")):
        for entry in _blend(config, kind) if objective != other else []:
            for suffix in INDEXED_SUFFIXES:
                if not Path(entry.path + suffix).is_file():
                    yield Problem(
                        f"data.{kind}",
                        f"data.{kind}: there is no file {entry.path}{suffix}; make it with "
                        "tools/preprocess/build_grit.py",
                    )
    if data.tokenizer is not None:
        tokenizer = Path(data.tokenizer)
        if not tokenizer.exists():
            yield Problem("data.tokenizer", f"data.tokenizer: there is no file {tokenizer}")
        elif tokenizer.is_dir() and not any((tokenizer / name).is_file() for name in TOKENIZER_FILES):
            yield Problem("data.tokenizer", f"data.tokenizer: no {' or '.join(TOKENIZER_FILES)} in {tokenizer}")
    load = config.checkpoint.load
    if load is not None and not Path(load).is_dir():
        yield Problem("checkpoint.load", f"checkpoint.load: there is no directory {load}")
    output = Path(config.output_dir)
    if output.exists() and not output.is_dir():
        yield Problem("output_dir", f"output_dir: {output} is a file, not a directory")
