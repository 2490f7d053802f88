"""What a restored run must look like before it goes on: a restore that went wrong trains on without a word."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_grit.data.rows.loader import GritDataLoader
from megatron_grit.errors import CheckpointError
from megatron_grit.parallel.random import RandomState


def optimizer_parts(optimizer: Any) -> list[Any]:
    """The optimizers that the engine chained: of dense and of expert parameters."""
    return getattr(optimizer, "chained_optimizers", [optimizer])


def optimizer_step(optimizer: Any) -> int | None:
    """Updates that Adam counts; of the parameters the most. None: before the first one."""
    return max((int(step) for step in _adam_steps(optimizer)), default=None)


def check_optimizer_step(path: Path, optimizer: Any, saved: int | None) -> None:
    """Compare Adam's counts with the checkpoint's: its bias correction depends on them.

    Args:
        path: the checkpoint, for messages.
        optimizer: the engine's, restored.
        saved: ``optimizer_step`` of state.json. None: of an older checkpoint, not known.

    Raises:
        CheckpointError: a count differs, or parameters share one tensor, which each of them would then advance.
    """
    where = f"{path}: the optimizer was not restored as it was saved"
    steps = _adam_steps(optimizer)
    for step in steps:
        if saved is not None and int(step) != saved:
            raise CheckpointError(f"{where}: Adam is at step {int(step)}, {saved} was saved; use another checkpoint")
    tensors = [step for step in steps if isinstance(step, Tensor)]
    if len({tensor.data_ptr() for tensor in tensors}) < len(tensors):
        raise CheckpointError(f"{where}: parameters share one step count; use another checkpoint")


def _adam_steps(optimizer: Any) -> list[Tensor | int]:
    """Step counts of all parameters (torch's Adam) or of all groups (TransformerEngine's)."""
    found: list[Tensor | int] = []
    for part in optimizer_parts(optimizer):
        own = [state["step"] for state in part.optimizer.state.values() if "step" in state]
        found += own or [group["step"] for group in part.optimizer.param_groups if "step" in group]
    return found


def check_random_states(path: Path, saved: dict[str, Tensor]) -> None:
    """Compare this process's generators with those of a checkpoint, just before the first step draws from them.

    Raises:
        CheckpointError: one differs.
    """
    present = RandomState.capture().as_tensors()
    for name, state in saved.items():
        if name not in present or not torch.equal(present[name].cpu(), state.cpu()):
            raise CheckpointError(
                f"{path}: random state {name} was not restored as it was saved; use another checkpoint"
            )


def check_next_records(path: Path, saved: str | None, present: str | None, step: int) -> None:
    """Compare the records that a run is about to train on with those that the checkpoint announced.

    Args:
        path: the checkpoint, for messages.
        saved: ``next_records`` of state.json. None: not known.
        present: fingerprint of the same step of the loader at hand. None: not known.
        step: first step to train, from 0.

    Raises:
        CheckpointError: they differ.
    """
    if saved is None or present is None or saved == present:
        return
    raise CheckpointError(
        f"{path}: step {step + 1} would train on other records than the run that saved it; give it the same data "
        "files, blend, batch sizes, seed and data.retro_version, or set checkpoint.same_data to false to go on with "
        "the new ones"
    )


def check_versions_read(path: Path, saved: Sequence[Mapping[str, Any]], loader: GritDataLoader, step: int) -> None:
    """Compare what a run is about to read from its retrieval database with what the checkpoint says of it.

    Args:
        path: the checkpoint, for messages.
        saved: ``versions_read`` of state.json; empty: not known.
        loader: of this run.
        step: first step to train, from 0.

    Raises:
        CheckpointError: another version is read, or the chunks or neighbors of the version are others now.
        ConfigError, DataError: it is gone or damaged.
    """
    present = loader.versions_read()
    if not saved or not present:
        return
    was, now = (next(each for each in reversed(record) if each["first_step"] <= step) for record in (saved, present))
    remedy = "or set checkpoint.same_data to false to go on with what is there"
    if was["version"] != now["version"]:
        raise CheckpointError(
            f"{path}: step {step + 1} of the run that saved it reads version {was['version']} of the retrieval "
            f"database, and this run version {now['version']}; set data.retro_version to {was['version']}, {remedy}"
        )
    present_identity = loader.open_version(now["version"])
    if was["identity"] not in ("", present_identity):  # "": not known
        raise CheckpointError(
            f"{path}: version {was['version']} of data.retro_project has other chunks or neighbors than the run that "
            "saved it read, or that one trained on other files; give the same data.generative and data.valid, put the "
            f"files of the database back from a copy, {remedy}"
        )
