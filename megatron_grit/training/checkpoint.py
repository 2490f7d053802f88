"""Checkpoints: sharded, resharded on load to any layout, and either whole or not there.

A checkpoint is a directory ``step_00000500`` under ``<output_dir>/checkpoints``:

    weights/          model (torch_dist)
    optimizer/        optimizer states, absent where only weights were saved (torch_dist)
    random/           random states of each rank (safetensors)
    config.yaml       the resolved configuration
    tokenizer.*       the tokenizer's file
    state.json        step, layout, versions, vocabulary
    manifest.json     size and SHA-256 of all the others

It is written under a temporary name, flushed to disk and renamed when complete. Loading compares what it is about to
read with the manifest.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.validation import StrictHandling
from torch.distributed.checkpoint.api import CheckpointException

from megatron_grit import compat
from megatron_grit.config.parse import load_config, save_config
from megatron_grit.config.schema import RunConfig
from megatron_grit.data.tokenizer import Tokenizer
from megatron_grit.errors import CheckpointError
from megatron_grit.models.gpt import GritGPTModel
from megatron_grit.parallel.context import ParallelContext
from megatron_grit.parallel.random import RandomState
from megatron_grit.training.manifest import verify_manifest, write_manifest

FORMAT_VERSION = 1
_NAME = re.compile(r"step_\d{8,}")
_METADATA = {"distrib_optim_sharding_type": "fully_reshardable"}

Stage = GritGPTModel | Sequence[GritGPTModel]
"""A process's pipeline stage: one model, or its chunks of layers under an interleaved pipeline."""


def checkpoint_path(output_dir: str | Path, step: int) -> Path:
    """Directory of a step's checkpoint."""
    return Path(output_dir) / "checkpoints" / f"step_{step:08d}"


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    found = (Path(output_dir) / "checkpoints").glob("step_*")
    return sorted(path for path in found if _NAME.fullmatch(path.name) and (path / "state.json").is_file())


def resolve_checkpoint(path: str | Path) -> Path:
    """A checkpoint directory, or the newest one of a run's output directory.

    Raises:
        CheckpointError: there is none.
    """
    path = Path(path)
    if (path / "state.json").is_file():
        return path
    found = list_checkpoints(path)
    if not found:
        raise CheckpointError(f"{path}: no checkpoint here; expected state.json or checkpoints/step_*/state.json")
    return found[-1]


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


def save_checkpoint(
    config: RunConfig,
    context: ParallelContext,
    model: Stage,
    optimizer: Any | None,
    tokenizer: Tokenizer,
    step: int,
) -> Path:
    """Write a checkpoint; on return it is complete. Collective over all ranks.

    Args:
        config: the resolved configuration.
        context: this process's place in the mesh.
        model: this process's stage, or its chunks, unwrapped.
        optimizer: the engine's optimizer. None: save weights only.
        tokenizer: copied beside the weights.
        step: steps that were trained.
    """
    final = checkpoint_path(config.output_dir, step)
    partial = final.with_name(final.name + ".partial")
    if context.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for name in ("random", "optimizer") if optimizer is not None else ():
            (partial / name).mkdir()
        save_config(config, partial / "config.yaml")
        shutil.copyfile(tokenizer.path, partial / f"tokenizer{Path(tokenizer.path).suffix}")
    dist.barrier()
    save_weights(model, context, partial)
    if optimizer is not None:
        state = optimizer.sharded_state_dict(model_state(model, context), metadata=_METADATA | _groups(context))
        dist_checkpointing.save({"optimizer": state}, str(partial / "optimizer"))
        random = RandomState.capture().as_tensors()
        safetensors.torch.save_file(random, str(partial / "random" / f"rank_{context.rank:05d}.safetensors"))
    if context.rank == 0:
        (partial / "state.json").write_text(json.dumps(_state(config, context, tokenizer, step), indent=1) + "\n")
    dist.barrier()
    write_manifest(partial, context)
    if context.rank == 0:
        replaced = final.with_name(final.name + ".replaced")
        shutil.rmtree(replaced, ignore_errors=True)
        if final.exists():  # a step that was saved before: two renames, so that one of the two is always there
            final.rename(replaced)
        partial.rename(final)
        shutil.rmtree(replaced, ignore_errors=True)
        _remove_old(config)
    dist.barrier()
    return final


def _state(config: RunConfig, context: ParallelContext, tokenizer: Tokenizer, step: int) -> dict[str, Any]:
    return {
        "format_version": FORMAT_VERSION,
        "step": step,
        "world_size": context.world_size,
        "parallel": {
            "tensor": context.tensor_size,
            "pipeline": context.pipeline_size,
            "context": context.context_size,
            "data": context.data_size,
            "expert": context.expert_size,
        },
        "vocab_size": config.model.vocab_size or tokenizer.vocab_size,
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "seed": config.training.seed,
        "versions": compat.installed_versions(),
    }


def _remove_old(config: RunConfig) -> None:
    if config.checkpoint.keep:
        for path in list_checkpoints(config.output_dir)[: -config.checkpoint.keep]:
            shutil.rmtree(path)


def _groups(context: ParallelContext) -> dict[str, Any]:
    return {"dp_cp_group": context.replica_group}


def model_state(model: Stage, context: ParallelContext) -> dict[str, Any]:
    """The model's sharded state dict; with several chunks one for each, under "chunk0" and so on.

    Names on disk hold the number of a layer in the whole model, so they do not depend on the chunks.
    """
    states = [chunk.sharded_state_dict(metadata=_groups(context)) for chunk in _chunks(model)]
    return states[0] if len(states) == 1 else {f"chunk{number}": state for number, state in enumerate(states)}


def _chunks(model: Stage) -> list[GritGPTModel]:
    return list(model) if isinstance(model, Sequence) else [model]


def save_weights(model: Stage, context: ParallelContext, path: Path) -> None:
    """Write the weights alone under ``path/weights``. Collective over all ranks."""
    if context.rank == 0:
        (path / "weights").mkdir(parents=True, exist_ok=True)
    dist.barrier()
    dist_checkpointing.save(model_state(model, context), str(path / "weights"))
    dist.barrier()


def load_weights(path: Path, model: Stage, context: ParallelContext) -> None:
    """Load a checkpoint's weights, whatever layout it was saved from. Collective over all ranks.

    Raises:
        CheckpointError: a tensor is missing, is not in the model, or has another shape.
    """
    verify_manifest(path, context, "weights")
    state = model_state(model, context)
    try:
        loaded, missing, unexpected = dist_checkpointing.load(
            state, str(path / "weights"), strict=StrictHandling.RETURN_ALL
        )
    except (CheckpointException, CheckpointingException, RuntimeError, ValueError, KeyError, OSError) as error:
        raise CheckpointError(
            f"{path}: does not fit this model or is damaged ({_reason(error)}); compare its config.yaml with the model "
            "section in use"
        ) from error
    missing = {name for name in missing if not name.endswith("_extra_state")}
    unexpected = {name for name in unexpected if not name.endswith("_extra_state")}
    if missing or unexpected:
        named = ", ".join(sorted(missing | unexpected)[:4])
        raise CheckpointError(
            f"{path}: is of another model; {len(missing)} of its tensors are not in this one and {len(unexpected)} are "
            f"missing from it, such as {named}"
        )
    chunks = _chunks(model)
    for number, chunk in enumerate(chunks):
        chunk.load_state_dict(loaded if len(chunks) == 1 else loaded[f"chunk{number}"], strict=False)


def _reason(error: BaseException) -> str:
    """First line of what went wrong, on the first rank where something did."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


def check_same_model(path: Path, config: RunConfig) -> None:
    """Refuse to go on from a checkpoint whose model the configuration does not describe.

    Raises:
        CheckpointError: names the first key that differs.
    """
    saved = read_config(path)
    for section in ("model", "embedding"):
        before, now = vars(getattr(saved, section)), vars(getattr(config, section))
        for key in before:
            if before[key] != now[key] and key != "attention_backend":
                raise CheckpointError(
                    f"{path}: was trained with {section}.{key} {before[key]}, and this run has {now[key]}; choose "
                    "another output_dir, or set checkpoint.resume to false to start afresh in this one"
                )


def load_training_state(path: Path, model: Stage, optimizer: Any, context: ParallelContext) -> int:
    """Load weights, optimizer and, where the number of processes is the same, random states. Collective.

    Returns:
        Steps that were trained.
    """
    for folder in ("optimizer", "random"):
        verify_manifest(path, context, folder)
    load_weights(path, model, context)
    state = read_state(path)
    if state["step"] == 0:
        optimizer.reload_model_params()
        return 0
    if not (path / "optimizer").is_dir():
        raise CheckpointError(f"{path}: holds weights only; start from it with checkpoint.load")
    for part in _parts(optimizer):
        part._init_optimizer_states_with_dummy_values()
    wanted = optimizer.sharded_state_dict(
        model_state(model, context), is_loading=True, metadata=_METADATA | _groups(context)
    )
    loaded = dist_checkpointing.load({"optimizer": wanted}, str(path / "optimizer"))
    for part in _parts(optimizer):
        _tolerate_missing_step(part)
    optimizer.load_state_dict(loaded["optimizer"])
    for part in _parts(optimizer):
        _separate_adam_steps(part)
    if state["world_size"] == context.world_size:
        file = path / "random" / f"rank_{context.rank:05d}.safetensors"
        RandomState.from_tensors(safetensors.torch.load_file(str(file))).restore()
    return int(state["step"])


def _parts(optimizer: Any) -> list[Any]:
    """The optimizers that the engine chained: dense and expert parameters."""
    return getattr(optimizer, "chained_optimizers", [optimizer])


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
