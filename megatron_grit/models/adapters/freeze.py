"""Which parameters are trained."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_grit.config.schema import RunConfig
from megatron_grit.errors import ConfigError
from megatron_grit.models.adapters.names import global_name

PRESETS: dict[str, tuple[str, ...]] = {
    "biases": ("*.bias",),
    "norms": ("*layernorm.*",),
    "embeddings": ("embedding.*",),
    "head": ("output_layer.*",),
}
"""Names of groups of parameters. biases is BitFit (arXiv 2106.10199)."""

_EXPERT = re.compile(r"local_experts\.\d+")
_ALWAYS = ("*.adapter.*", "embedding_head.*", "embedding_pooling.*")
"""New parameters, which a base does not have."""


def select_trainable(chunks: Sequence[Any], config: RunConfig) -> None:
    """Freeze what is not to be trained, by ``training.trainable``, ``training.frozen`` and ``adapter.kind``.

    All parameters are trained by default; with adapters or ``training.trainable`` only adapters, the embedding head
    and what ``training.trainable`` names. Then ``training.frozen`` is taken out. Names are those of the whole model,
    so every layout selects the same. Collective over all ranks where there are patterns.

    Args:
        chunks: of this process (:class:`~megatron_grit.models.decoder.GritDecoder`), adapters in place.
        config: the run.

    Raises:
        ConfigError: a pattern matches no parameter, or nothing is left to train; on every rank.
    """
    training = config.training
    selective = bool(training.trainable) or config.adapter.kind != "none"
    if not selective and not training.frozen:
        return
    named = [
        (global_name(chunk, name), parameter)
        for chunk in chunks
        for name, parameter in chunk.named_parameters(remove_duplicate=False)
    ]
    wanted = [*_ALWAYS, *_patterns(training.trainable)]
    unwanted = _patterns(training.frozen)
    for name, parameter in named:
        trained = not selective or _matches(name, wanted)
        parameter.requires_grad_(trained and not _matches(name, unwanted))
    for key, given in (("trainable", training.trainable), ("frozen", training.frozen)):
        _check_all_match(f"training.{key}", given, [name for name, _ in named])
    if not _on_any_rank([any(parameter.requires_grad for _, parameter in named)])[0]:
        raise ConfigError("training.trainable and training.frozen leave no parameter to train")
    _check_experts_alike(dict(named))
    for chunk in chunks:
        chunk.layers_differ = any(entry not in PRESETS for entry in [*training.trainable, *training.frozen])


def has_trained(module: torch.nn.Module) -> bool:
    """Whether any parameter of a module is trained."""
    return any(parameter.requires_grad for parameter in module.parameters())


def reach_back(states: Tensor) -> Tensor:
    """The same states, as a leaf that requires a gradient if everything before them is frozen."""
    if not torch.is_grad_enabled() or states.requires_grad:
        return states
    return states.detach().requires_grad_()


def count_trainable(chunks: Sequence[torch.nn.Module]) -> tuple[int, int]:
    """Parameters of this process that are trained, and all of them."""
    parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
    return sum(parameter.numel() for parameter in parameters if parameter.requires_grad), sum(
        parameter.numel() for parameter in parameters
    )


def _patterns(given: Sequence[str]) -> list[str]:
    return [pattern for entry in given for pattern in PRESETS.get(entry, (entry,))]


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _check_all_match(key: str, given: Sequence[str], names: Sequence[str]) -> None:
    if not given:
        return
    found = _on_any_rank([any(_matches(name, _patterns([entry])) for name in names) for entry in given])
    for entry, is_found in zip(given, found, strict=True):
        if not is_found:
            shown = ", ".join(sorted(names)[:3])
            raise ConfigError(
                f"{key}: {entry!r} matches no parameter of the model; names are such as {shown}, layers and experts by "
                f"their number from 0, and {', '.join(PRESETS)} stand for groups of them"
            )


def _check_experts_alike(named: dict[str, torch.nn.Parameter]) -> None:
    """Experts of a layer are trained all or none: expert parallel ranks update theirs together, and their states are
    one tensor of a checkpoint."""
    local = sorted({(_EXPERT.sub("local_experts.*", name), p.requires_grad) for name, p in named.items()})
    gathered = [local] * dist.get_world_size()
    if len(gathered) > 1:  # one process also builds models without storage, on a device that gathers nothing
        dist.all_gather_object(gathered, local)
    found = [name for name, _ in sorted({entry for entries in gathered for entry in entries})]
    split = next((name for name, after in zip(found, found[1:], strict=False) if name == after), None)
    if split is not None:
        raise ConfigError(
            f"training.trainable or training.frozen takes some experts of {split} and leaves others; write "
            "local_experts.* to take all of a layer"
        )


def _on_any_rank(flags: Sequence[bool]) -> list[bool]:
    """Each flag, set where it is on any process of the job."""
    if dist.get_world_size() == 1:  # where models are built without storage, too
        return list(flags)
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else "cpu"
    values = torch.tensor([float(flag) for flag in flags], device=device)
    dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return [value > 0 for value in values.tolist()]
