"""Loads PEFT adapters into a model that is sharded over ranks, at any layout."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_grit.config.adapter_shape import rank_of, scaling_of
from megatron_grit.config.schema import ModelConfig, RunConfig
from megatron_grit.convert.families.registry import family_of_model
from megatron_grit.convert.peft.reader import read_peft
from megatron_grit.convert.peft.sites import WholeAdapter, resized
from megatron_grit.convert.peft.writer import is_peft_folder
from megatron_grit.convert.shards import shard_of
from megatron_grit.errors import CheckpointError, ConfigError
from megatron_grit.models.adapters import adapted_linears, global_name
from megatron_grit.models.decoder import GritDecoder
from megatron_grit.parallel.collectives import any_rank
from megatron_grit.parallel.context import ParallelContext
from megatron_grit.store.logs import get_logger
from megatron_grit.training.trainer import InitialWeights

log = get_logger(__name__)

_SHAPE = ("rank", "alpha", "rslora", "rank_pattern", "alpha_pattern")


def peft_adapters(config: RunConfig) -> InitialWeights | None:
    """The function that fills the adapters of a new run if ``adapter.load`` is a PEFT directory; else None."""
    path = config.adapter.load
    if path is None or not is_peft_folder(path):
        return None

    def fill(chunks: Sequence[GritDecoder], context: ParallelContext) -> None:
        problem: CheckpointError | ConfigError | None = None
        try:
            load_peft(path, config, chunks)
        except (CheckpointError, ConfigError) as error:
            problem = error
        if any_rank(problem is not None, context):
            raise problem or CheckpointError(f"{path}: cannot be read; another rank says why")
        log.info(f"started from the adapters of {path}")

    return fill


def load_peft(path: str | Path, config: RunConfig, chunks: Sequence[GritDecoder]) -> None:
    """Fill the adapters of this process's chunks from a PEFT directory. Not collective.

    The run may have a higher rank and another alpha: factors are padded and rescaled, the function stays the same.

    Args:
        config: the run; its adapters must be of the same kind, and reach all that the directory has.
        chunks: this process's stage, with adapters.

    Raises:
        CheckpointError: the directory cannot be used; names file and key.
        ConfigError: the run's adapters cannot hold it; names the key to set.
    """
    adapter = read_peft(path, config.model)
    check_fits(path, adapter, config)
    if adapter.config.dropout not in (0, config.adapter.dropout):
        log.warning(f"{path} was trained with dropout {adapter.config.dropout}, this run has {config.adapter.dropout}")
    fill_adapters(chunks, adapter)
    fill_trained(chunks, adapter.trained, config.model)


def check_fits(path: str | Path, adapter: WholeAdapter, config: RunConfig) -> None:
    """Refuse an adapter that the run's adapters cannot hold. Logs where they hold it with other ranks or scalings.

    Raises:
        ConfigError: names the key to set.
    """
    ours, found = config.adapter, adapter.config
    if ours.kind != found.kind:
        raise ConfigError(f"adapter.kind is {ours.kind} and {path} holds {found.kind}; set it to {found.kind}")
    settings = {name: getattr(found, name) for name in _SHAPE if getattr(found, name) != getattr(ours, name)}
    told = ", ".join(f"adapter.{name} {value}" for name, value in settings.items())
    for name, rank in adapter.ranks().items():
        if rank_of(ours, name) < rank:
            raise ConfigError(
                f"adapter.rank is {rank_of(ours, name)} and {path} has rank {rank} for {name}; set {told}"
            )
    missing = [target for target in found.targets or [] if ours.targets is not None and target not in ours.targets]
    if missing:
        raise ConfigError(f"adapter.targets lacks {', '.join(missing)}, which {path} has adapters of; add them")
    names = adapter.ranks()
    if any(
        (rank_of(ours, name), scaling_of(ours, name)) != (rank_of(found, name), scaling_of(found, name))
        for name in names
    ):
        log.warning(
            f"{path}: the run starts from the same function, but its steps are other ones than PEFT's without {told}"
        )


@torch.no_grad()
def fill_adapters(chunks: Sequence[GritDecoder], adapter: WholeAdapter) -> None:
    """Fill each adapter of this process with its shard; projections that ``adapter`` lacks keep their values."""
    for chunk in chunks:
        for name, linear in adapted_linears(chunk).items():
            split = linear.adapter.split
            for part_name, part in linear.adapter.parts.items():
                whole_name = global_name(chunk, name)
                factors = adapter.part(whole_name, part_name)
                if not factors:
                    continue
                factors = resized(factors, len(part.lora_A), adapter.scaling(whole_name, part_name), part.scaling)
                for factor, whole in factors.items():
                    parameter: Tensor = getattr(part, factor)
                    axis = split.axis_of(factor)
                    own = whole if axis is None else whole.chunk(split.size, axis)[dist.get_rank(split.group)]
                    assert own.shape == parameter.shape
                    parameter.copy_(own)


@torch.no_grad()
def fill_trained(chunks: Sequence[GritDecoder], trained: dict[str, Tensor], model: ModelConfig) -> None:
    """Fill parameters that were trained in addition to adapters (``modules_to_save``) with their shards.

    Args:
        trained: whole tensors by their names in Hugging Face's model.

    Raises:
        CheckpointError: a parameter is made of several of them, and not all are there; or one has another shape.
    """
    made = {}
    for name, kind, targets in family_of_model(model).outputs(model):
        there = [trained[target] for target in targets if target in trained]
        if there and len(there) < len(targets):
            missing = next(target for target in targets if target not in trained)
            raise CheckpointError(f"modules_to_save hold a part of {name} and not {missing}; save both or neither")
        if there:
            made[name] = (kind, there, targets[0])
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            if (found := made.get(global_name(chunk, name))) is None:
                continue
            kind, there, target = found
            value = kind.hf_to_megatron(there, model, 0, shard_of(chunk, name, parameter))
            if value.shape != parameter.shape:
                raise CheckpointError(
                    f"modules_to_save: {target} has shape {list(there[0].shape)}, which is not this model's; a "
                    "vocabulary that grew needs the same model.vocab_size"
                )
            parameter.copy_(value)
