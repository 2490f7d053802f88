"""Whether a run fits the checkpoint that it resumes from or starts with, as far as its config.yaml tells."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from megatron_grit.config.checkpoint_folder import (
    REPLACED,
    holds_checkpoint,
    list_checkpoints,
    resolve_checkpoint,
    started_from,
)
from megatron_grit.config.parse import load_config
from megatron_grit.config.schema import RunConfig
from megatron_grit.config.shape import computing_settings, effective, reading_layers
from megatron_grit.errors import CheckpointError, GritError

_MAKES: dict[str, Callable[[Any], bool]] = {"num_neighbors": bool, "gate": lambda gate: gate is None}
"""Options of ``model.retro`` that may change unless it changes which parameters there are."""
_SIZES = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads")


def check_same_model(path: Path, config: RunConfig) -> None:
    """Refuse to go on from a checkpoint whose model the configuration does not describe.

    Raises:
        CheckpointError: names the first key that differs.
    """
    saved = load_config(path / "config.yaml")
    for section in ("model", "embedding", "adapter", "training"):
        for name, before, now in _changed(section, getattr(saved, section), getattr(config, section)):
            raise CheckpointError(
                f"{path}: was trained with {name} {_told(before)}, and this run has {_told(now)}; choose another "
                "output_dir, or set checkpoint.resume to false to start afresh in this one"
            )


def _changed(section: str, saved: Any, present: Any) -> Iterator[tuple[str, Any, Any]]:
    """Options of a section that differ and may not, with both values; those of sections in it as well."""
    for field in fields(present):
        before, now = getattr(saved, field.name), getattr(present, field.name)
        if is_dataclass(now):
            yield from _changed(f"{section}.{field.name}", before, now)
            continue
        makes = _MAKES.get(field.name)
        may_change = field.metadata.get("may_change", section == "training")
        if before != now and not (may_change and (makes is None or makes(before) == makes(now))):
            yield f"{section}.{field.name}", before, now


def _told(value: Any) -> Any:
    """As a configuration says it."""
    return "null" if value is None else value


def check_same_parameters(path: Path, config: RunConfig) -> None:
    """Refuse to start from a checkpoint whose decoder is of another size, or reads neighbors in another way. One that
    reads none is taken.

    Raises:
        CheckpointError: names the first option that differs and makes other parameters.
    """
    if not (path / "config.yaml").is_file():
        return
    saved, present = load_config(path / "config.yaml").model, config.model
    pairs = [(name, getattr(saved, name), getattr(present, name)) for name in _SIZES]
    if saved.retro.num_neighbors:
        pairs += [
            ("retro.num_neighbors", saved.retro.num_neighbors, present.retro.num_neighbors),
            ("retro.layers", reading_layers(saved), reading_layers(present)),
            ("retro.encoder_layers", saved.retro.encoder_layers, present.retro.encoder_layers),
            ("retro.encoder_conditioning", saved.retro.encoder_conditioning, present.retro.encoder_conditioning),
            ("retro.gate", saved.retro.gate, present.retro.gate),
        ]
    for name, before, now in pairs:
        makes = _MAKES.get(name.removeprefix("retro."))
        if before != now and (makes is None or makes(before) != makes(now)):
            raise CheckpointError(
                f"{path}: was trained with model.{name} {_told(before)}, which makes other parameters than "
                f"{_told(now)}; set model.{name} to {_told(before)}"
            )


def unlike_reader(config: RunConfig) -> Iterator[str]:
    """A warning of a run that reads chunks of another length than the checkpoint of ``checkpoint.load`` does, which
    makes no other parameters.

    Raises:
        ConfigError, CheckpointError: its config.yaml cannot be read.
    """
    for path in started_from(config)[:1]:
        if not (path / "config.yaml").is_file():
            continue
        saved, present = load_config(path / "config.yaml").model.retro, config.model.retro
        if saved.num_neighbors and present.num_neighbors and saved.chunk_length != present.chunk_length:
            yield (
                f"warning: {path} was trained with model.retro.chunk_length {saved.chunk_length}, and this run has "
                f"{present.chunk_length}, that of its database"
            )


def unlike_model(config: RunConfig) -> Iterator[str]:
    """A warning of a run whose model computes otherwise with the weights of ``checkpoint.load`` than the model that was
    trained, by options that make no other parameters.

    Raises:
        ConfigError, CheckpointError: its config.yaml cannot be read.
    """
    for path in started_from(config)[:1]:
        if not (path / "config.yaml").is_file():
            continue
        saved, present = load_config(path / "config.yaml").model, config.model
        told = []
        for name in computing_settings(config)[0]:
            before, now = effective(saved, name), effective(present, name)
            if before == now or name in (*_SIZES, "vocab_size", "retro"):  # refused, or told of, by themselves
                continue
            if name != "max_position_embeddings" or now > before or present.position_embedding != "rope":
                told.append(f"model.{name} {_told(before)}, here {_told(now)}")
        if told:
            yield f"warning: {path} was trained with other options than this run has: {'; '.join(told)}"


def checkpoint_errors(config: RunConfig) -> Iterator[GritError]:
    """What the start of a run would refuse of the checkpoint that it resumes from, or else of ``checkpoint.load``."""
    found = list_checkpoints(config.output_dir)[-1:] if config.checkpoint.resume else []
    try:
        if found:
            check_same_model(found[0], config)
        elif config.checkpoint.load is not None:
            check_same_parameters(resolve_checkpoint(config.checkpoint.load), config)
    except GritError as error:
        # One of Megatron-LM has another form; one that is not there is told of when it is loaded.
        if found or holds_checkpoint(config.checkpoint.load or ""):
            yield error


def _stopped_early(path: Path, config: RunConfig) -> int:
    """Measurements without a better figure for which a run with this checkpoint has stopped; 0: it has not."""
    stopping = config.evaluation.early_stopping
    try:
        saved = json.loads((path / "state.json").read_bytes())["evaluation"]["early_stopping"]
        waited = int(saved["waited"]) if saved["metric"] == stopping.metric else 0
    except (OSError, ValueError, KeyError, TypeError):  # a damaged file is told of when the run resumes
        return 0
    return waited if waited >= stopping.patience else 0


def finished_lines(config: RunConfig) -> list[str]:
    """A line about a run whose newest checkpoint is of its last step, or of a later one, or that stopped early; none
    where there is something to do.

    Raises:
        CheckpointError: the checkpoint is of another model.
    """
    if not config.checkpoint.resume or config.training.skip_train:
        return []
    newest, last = list_checkpoints(config.output_dir)[-1:], config.training.steps
    step = int(newest[0].name.removesuffix(REPLACED).removeprefix("step_")) if newest else -1
    if newest and step < last and (waited := _stopped_early(newest[0], config)):
        check_same_model(newest[0], config)
        return [
            f"{config.output_dir} stopped early after step {step:,}: {config.evaluation.early_stopping.metric} was no "
            f"better in {waited} measurements. Nothing to do; to go on raise evaluation.early_stopping.patience"
        ]
    if step < last:
        return []
    check_same_model(newest[0], config)
    return [
        f"{config.output_dir} is finished: its newest checkpoint is of step {step:,}, and training.steps is {last:,}. "
        "Nothing to do; to go on raise training.steps, to start afresh give another output_dir"
    ]
