"""Checkpoints: what is in one, where it is, and how it is loaded at any layout. :mod:`checkpoint_save` writes them.

A checkpoint is a directory ``step_00000500`` under ``<output_dir>/checkpoints``:

    weights/          model (torch_dist)
    optimizer/        optimizer states, absent where only weights were saved (torch_dist)
    random/           random states of each rank (safetensors)
    config.yaml       the resolved configuration
    tokenizer.*       the tokenizer's file
    state.json        step, layout, versions, vocabulary, and what a restored run is compared with
    manifest.json     size and SHA-256 of all the others

Loading compares what it is about to read with the manifest.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.validation import StrictHandling
from torch.distributed.checkpoint.api import CheckpointException

from megatron_grit.config.checkpoint_folder import list_checkpoints as list_checkpoints
from megatron_grit.config.checkpoint_folder import resolve_checkpoint as resolve_checkpoint
from megatron_grit.config.parse import load_config
from megatron_grit.config.schema import RunConfig
from megatron_grit.errors import CheckpointError
from megatron_grit.models.adapters import adapted_linears
from megatron_grit.models.decoder import GritDecoder
from megatron_grit.models.names import of_head, reads
from megatron_grit.parallel.collectives import any_rank
from megatron_grit.parallel.context import ParallelContext
from megatron_grit.parallel.random import RandomState
from megatron_grit.store.logs import get_logger
from megatron_grit.training.manifest import verify_manifest
from megatron_grit.training.megatron_checkpoint import NUMBERED, MegatronNames, is_other_state
from megatron_grit.training.restore_checks import check_optimizer_step, optimizer_parts
from megatron_grit.training.sharded_write import ShardedWrite

log = get_logger(__name__)

FORMAT_VERSION = 1
_SHARDING = "fully_reshardable"
# Without the second, experts that are split over ranks give the dense and the expert optimizer names of their own.
_METADATA = {"distrib_optim_sharding_type": _SHARDING, "chained_optim_avoid_prefix": True}
_LOAD_ERRORS = (CheckpointException, CheckpointingException, RuntimeError, ValueError, KeyError, OSError)

Stage = GritDecoder | Sequence[GritDecoder]
"""A process's pipeline stage: one model, or its chunks of layers under an interleaved pipeline."""


def checkpoint_path(output_dir: str | Path, step: int) -> Path:
    """Directory of a step's checkpoint."""
    return Path(output_dir) / "checkpoints" / f"step_{step:08d}"


def read_state(path: Path) -> dict[str, Any]:
    """The ``state.json`` of a checkpoint.

    Raises:
        CheckpointError: it cannot be read, or is of a newer format.
    """
    try:
        state = json.loads((path / "state.json").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path / 'state.json'}: cannot be read ({error}); use another checkpoint") from error
    if state.get("format_version", 0) > FORMAT_VERSION:
        raise CheckpointError(f"{path}: format {state['format_version']} is newer than {FORMAT_VERSION}; update")
    return state


def read_config(path: Path) -> RunConfig:
    """The configuration that a checkpoint was trained with."""
    return load_config(path / "config.yaml")


def tokenizer_path(path: Path) -> Path | None:
    """The tokenizer's file in a checkpoint."""
    return next((path / name for name in ("tokenizer.model", "tokenizer.json") if (path / name).is_file()), None)


def model_state(model: Stage, context: ParallelContext, **metadata: Any) -> dict[str, Any]:
    """The model's sharded state dict; with several chunks one for each, under "chunk0" and so on.

    Names on disk hold the number of a layer in the whole model, so they do not depend on the chunks.
    """
    chunks = stage_chunks(model)
    # Layers with and without cross-attention have other weights, so files number them.
    numbers = {"non_homogeneous_layers": True} if chunks[0].retro.num_neighbors else {}
    metadata = numbers | metadata | {"dp_cp_group": context.replica_group}
    states = [chunk.sharded_state_dict(metadata=metadata) for chunk in chunks]
    return states[0] if len(states) == 1 else {f"chunk{number}": state for number, state in enumerate(states)}


def saved_state(model: Stage, context: ParallelContext) -> dict[str, Any]:
    """What a checkpoint holds of a model: all of it, or with adapters what is trained."""
    chunks = stage_chunks(model)
    if not any(adapted_linears(chunk) for chunk in chunks):
        return model_state(model, context)
    state = _trained_names(model, context)
    kept = [{name for name, parameter in chunk.named_parameters() if parameter.requires_grad} for chunk in chunks]
    return _choose(state, kept)


def _trained_names(model: Stage, context: ParallelContext) -> dict[str, Any]:
    """:func:`model_state`, where need be under names by layer: the engine puts a parameter of all layers into one
    tensor of a file, which has to be whole."""
    by_layer = {"non_homogeneous_layers": True}
    return model_state(model, context, **(by_layer if stage_chunks(model)[0].layers_differ else {}))


def base_state(model: Stage, context: ParallelContext, **metadata: Any) -> dict[str, Any]:
    """:func:`model_state` without adapters: what a base has."""
    chunks = stage_chunks(model)
    state = model_state(model, context, **metadata)
    parts = [state] if len(chunks) == 1 else list(state.values())
    return _choose(state, [{name for name in part if ".adapter." not in name} for part in parts])


def _choose(state: dict[str, Any], names: Sequence[set[str]]) -> dict[str, Any]:
    """The entries of a sharded state dict that have these names, for each chunk."""
    parts = [state] if len(names) == 1 else list(state.values())
    chosen = [{name: part[name] for name in part if name in kept} for part, kept in zip(parts, names, strict=True)]
    return chosen[0] if len(chosen) == 1 else dict(zip(state, chosen, strict=True))


def optimizer_state(optimizer: Any, model: Stage, context: ParallelContext, *, is_loading: bool) -> dict[str, Any]:
    """The optimizer's sharded state dict, as ``optimizer/`` holds it."""
    metadata = _METADATA | {"dp_cp_group": context.replica_group}
    for part in optimizer_parts(optimizer):
        _tolerate_no_states(part)
    state = optimizer.sharded_state_dict(_trained_names(model, context), is_loading=is_loading, metadata=metadata)
    return {"optimizer": state}


def layout_of(context: ParallelContext) -> dict[str, int]:
    """What state.json says of the mesh."""
    return {
        "tensor": context.tensor_size,
        "pipeline": context.pipeline_size,
        "context": context.context_size,
        "data": context.data_size,
        "expert": context.expert_size,
    }


def stage_chunks(model: Stage) -> list[GritDecoder]:
    """The chunks of a stage, one or several."""
    return list(model) if isinstance(model, Sequence) else [model]


def save_weights(model: Stage, context: ParallelContext, path: Path) -> None:
    """Write the weights alone under ``path/weights``. Collective over all ranks."""
    if context.rank == 0:
        (path / "weights").mkdir(parents=True, exist_ok=True)
    dist.barrier()
    write = ShardedWrite(model_state(model, context), path / "weights")
    write.write()
    write.close()


def load_weights(path: Path, model: Stage, context: ParallelContext) -> None:
    """Load a checkpoint's weights, whatever layout it was saved from. Collective over all ranks.

    Args:
        path: a checkpoint of ours, or an iteration's directory of Megatron-LM's.
        model: this process's stage, or its chunks, unwrapped.
        context: this process's place in the mesh.

    Raises:
        CheckpointError: a tensor is missing, is not in the model, or has another shape.
    """
    if (path / "weights").is_dir():
        verify_manifest(path, context, "weights")
        if (path / "state.json").is_file() and "base" in read_state(path):
            raise CheckpointError(
                f"{path}: holds adapters and not the model that they were trained beside; give it as adapter.load, and "
                "their base as checkpoint.load or model.pretrained"
            )
        _load_model(path, path / "weights", _state_of(path / "weights", model, context), model)
    else:
        _load_megatron(path, model, context)


def _state_of(folder: Path, model: Stage, context: ParallelContext, **metadata: Any) -> dict[str, Any]:
    """:func:`base_state` as a folder of weights has it: without what reads neighbors where it holds a decoder that does
    not; those parameters keep their values."""
    saved: Collection[str] = ()
    if stage_chunks(model)[0].retro.num_neighbors:
        # Whatever the engine's reader meets in a damaged file: loading says it.
        with contextlib.suppress(Exception):
            saved = dist_checkpointing.load_tensors_metadata(str(folder))
    if not saved or any(map(reads, saved)):
        return base_state(model, context, **metadata)
    log.info(f"{folder.parent} holds a decoder that reads no neighbors; the parameters that read them start afresh")
    # Layers that are all alike are stacked in a file, and those of this model are not alike.
    state = base_state(model, context, non_homogeneous_layers=any(map(NUMBERED.match, saved)))
    parts = [state] if len(stage_chunks(model)) == 1 else list(state.values())
    return _choose(state, [{name for name in part if not reads(name)} for part in parts])


def load_adapters(path: Path, model: Stage, context: ParallelContext) -> None:
    """Load what a checkpoint of a run with adapters holds, beside the base that is there. Collective over all ranks.

    Raises:
        CheckpointError: it is damaged, or holds other adapters than this model has.
    """
    verify_manifest(path, context, "weights")
    _load_model(path, path / "weights", saved_state(model, context), model)


def _load_megatron(path: Path, model: Stage, context: ParallelContext) -> None:
    chunks, problem = stage_chunks(model), None
    state: dict[str, Any] = {}
    try:
        names = MegatronNames(path)
        state = _state_of(path, model, context, **names.metadata())
        names.rename(state)
        names.check(state, chunks[0].config.num_layers, chunks[0].num_tokens_in_vocab)
    except CheckpointError as error:
        problem = error
    if any_rank(problem is not None, context):
        raise problem or CheckpointError(f"{path}: does not fit this model; another rank says why")
    _load_model(path, path, state, model, is_megatron=True)


def _load_model(path: Path, folder: Path, state: dict[str, Any], model: Stage, *, is_megatron: bool = False) -> None:
    try:
        loaded, missing, unexpected = dist_checkpointing.load(state, str(folder), strict=StrictHandling.RETURN_ALL)
    except _LOAD_ERRORS as error:
        raise CheckpointError(f"{path}: does not fit this model or is damaged ({_reason(error)}){_COMPARE}") from error
    missing = {name for name in missing if "_extra_state" not in name}
    unexpected = {name for name in unexpected if "_extra_state" not in name}
    if is_megatron:
        missing = {name for name in missing if not is_other_state(name)}
        fresh = set(filter(of_head, unexpected))
        if fresh:
            log.info(f"{path} has no embedding head: it starts from its initial weights")
        unexpected -= fresh
    if missing or unexpected:
        named = ", ".join(sorted(missing | unexpected)[:4])
        raise CheckpointError(
            f"{path}: is of another model; {len(missing)} of its tensors are not in this one and {len(unexpected)} are "
            f"missing from it, such as {named}{_COMPARE if (path / 'config.yaml').is_file() else ''}"
        )
    chunks = stage_chunks(model)
    for number, chunk in enumerate(chunks):
        chunk.load_state_dict(loaded if len(chunks) == 1 else loaded[f"chunk{number}"], strict=False)


_COMPARE = "; compare its config.yaml with the model section in use"


def _reason(error: BaseException) -> str:
    """First line of what went wrong, on the first rank where something did."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


@dataclass(frozen=True, kw_only=True)
class Restored:
    """Where a run goes on from, and what its first step is compared with."""

    path: Path
    step: int
    """Steps that were trained."""
    random: dict[str, torch.Tensor] | None
    """Random states that were put back. None: the layout is another one, the generators are those of a fresh start."""
    next_records: str | None
    """Fingerprint of the records of the next step. None: not known."""
    evaluation: dict[str, Any]
    """What :class:`~megatron_grit.training.validation.standings.Standings` goes on from; empty where none was."""
    versions_read: list[dict[str, Any]]
    """Versions of the retrieval database by step, as the data loader told them; empty where none was read."""


def load_training_state(path: Path, model: Stage, optimizer: Any, context: ParallelContext) -> Restored:
    """Load weights, optimizer and, where the layout is the same, random states. Collective.

    Args:
        path: the checkpoint.
        model: this process's stage, or its chunks, unwrapped.
        optimizer: the engine's. None: the model is not trained on, and the weights are enough.
        context: this process's place in the mesh.

    Raises:
        CheckpointError: it is damaged, holds weights only, or the optimizer did not come out as it was saved.
    """
    verify_manifest(path, context, "weights" if optimizer is None else "")
    state = read_state(path)
    _load_model(path, path / "weights", saved_state(model, context), model)
    data: dict[str, Any] = {
        "next_records": state.get("next_records"),
        "versions_read": state.get("versions_read", []),
        "evaluation": state.get("evaluation", {}),
    }
    if optimizer is None:
        return Restored(path=path, step=int(state["step"]), random=None, **data)
    if state["step"] == 0:
        optimizer.reload_model_params()
        return Restored(path=path, step=0, random=None, **data)
    if not (path / "optimizer").is_dir():
        raise CheckpointError(f"{path}: holds weights only; start from it with checkpoint.load")
    _load_optimizer(path, optimizer, model, context, state.get("optimizer_step"))
    check_optimizer_step(path, optimizer, state.get("optimizer_step"))
    random = None
    if state["world_size"] == context.world_size and state["parallel"] == layout_of(context):
        random = safetensors.torch.load_file(str(random_file(path, context.rank)))
        RandomState.from_tensors(random).restore()
    return Restored(path=path, step=int(state["step"]), random=random, **data)


def _load_optimizer(path: Path, optimizer: Any, model: Stage, context: ParallelContext, step: int | None) -> None:
    parts = optimizer_parts(optimizer)
    for part in parts:
        _tolerate_no_states(part)
        part._init_optimizer_states_with_dummy_values()
    wanted = optimizer_state(optimizer, model, context, is_loading=True)
    groups = [part.state_dict()["optimizer"] for part in parts]
    try:
        loaded = dist_checkpointing.load(wanted, str(path / "optimizer"))["optimizer"]
    except _LOAD_ERRORS as error:
        raise CheckpointError(
            f"{path}: its optimizer does not fit this run or is damaged ({_reason(error)}); start from its weights "
            "with checkpoint.load"
        ) from error
    # Settings of parameter groups are the configuration's; of the saved ones only the step matters. How many groups
    # and optimizers there are depends on the layout.
    step = _saved_step(loaded) if step is None else step
    states = []
    for number, group in enumerate(groups):
        for entry in group["param_groups"]:
            entry["step"] = float(step)
        own = loaded[number] if len(parts) > 1 else loaded
        # A rank that owns no part of any trained parameter finds no states.
        param_state = own.get("param_state", {})
        states.append({"optimizer": group, "param_state": param_state, "param_state_sharding_type": _SHARDING})
    for part in parts:
        _tolerate_missing_step(part)
    optimizer.load_state_dict(states[0] if len(states) == 1 else dict(enumerate(states)))
    for part in parts:
        _separate_adam_steps(part)


def _tolerate_no_states(optimizer: Any) -> None:
    """Let a rank save that has no states: its pipeline stage trains nothing, or there are too few parameters for all
    data parallel ranks. The engine asks torch's Adam for its one step count (distrib_optimizer.py:642 of 0.16.1)."""
    if getattr(optimizer, "_grit_tolerates_no_states", False):
        return
    original = optimizer.state_dict

    def state_dict() -> dict[str, Any]:
        if optimizer.optimizer.state:
            state: dict[str, Any] = original()
            return state
        groups = optimizer.optimizer.state_dict()["param_groups"]
        kept = [{key: value for key, value in group.items() if key != "params"} | {"step": 0.0} for group in groups]
        return {"optimizer": {"param_groups": kept}}

    optimizer.state_dict = state_dict
    optimizer._grit_tolerates_no_states = True


def _saved_step(loaded: dict[Any, Any]) -> int:
    """Adam's step in a checkpoint whose state.json does not tell it."""
    first = loaded if "optimizer" in loaded else loaded[0]
    return int(first["optimizer"]["param_groups"][0]["step"])


def random_file(path: Path, rank: int) -> Path:
    """Where a checkpoint holds the random states of a rank."""
    return path / "random" / f"rank_{rank:05d}.safetensors"


def _tolerate_missing_step(optimizer: Any) -> None:
    """Let torch's Adam load: the engine keeps the step in the parameter groups and then looks for it per parameter
    (distrib_optimizer.py:940 of 0.16.1)."""
    if getattr(optimizer, "_grit_tolerates_missing_step", False):
        return
    original = optimizer._set_main_param_and_optimizer_states

    def set_states(model_param: torch.nn.Parameter, tensors: dict[str, Any]) -> None:
        if "step" not in tensors:
            group, order = optimizer.model_param_group_index_map[model_param]
            main = optimizer.optimizer.param_groups[group]["params"][order]
            step = optimizer.optimizer.state[main].get("step")
            if step is not None:
                tensors = tensors | {"step": step.clone()}
        original(model_param, tensors)

    optimizer._set_main_param_and_optimizer_states = set_states
    optimizer._grit_tolerates_missing_step = True


def _separate_adam_steps(optimizer: Any) -> None:
    """Give each parameter its own step count. The engine loads one tensor into all of them, which torch's Adam then
    advances once a parameter (distrib_optimizer.py:825 of 0.16.1): bias correction would be wrong after a resume."""
    for group in optimizer.optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.optimizer.state.get(parameter)
            if state and "step" in state and "step" in group:
                state["step"] = torch.tensor(float(group["step"]), dtype=torch.float32)
