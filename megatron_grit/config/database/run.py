"""A run that trains on the documents of a retrieval database: what its config.json says need not be said again."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from megatron_grit.config.checkpoint_folder import list_checkpoints
from megatron_grit.config.database.schema import CONFIG_FILE, RetroDbConfig, load_project_config, version_numbers
from megatron_grit.config.parse import load_config
from megatron_grit.config.schema import RunConfig
from megatron_grit.errors import ConfigError
from megatron_grit.store.logs import get_logger

log = get_logger(__name__)


def resolve_retro_project(config: RunConfig, origins: Mapping[str, str], *, files: bool = True) -> RunConfig:
    """Fill in what ``data.retro_project`` decides. A configuration without it comes back as it is.

    Args:
        config: as it was parsed.
        origins: where keys were given ("file:line"), from ``parse_train_arguments``.
        files: the directory must be there. Else one that is not there decides nothing.

    Raises:
        ConfigError: there is no database, or data.tokenizer was given and is another one.
    """
    if config.data.retro_project is None:
        return config
    folder = Path(config.data.retro_project)
    project = load_project_config(folder)
    if project is None:
        if files:
            raise ConfigError(
                f"data.retro_project {folder}: holds no {CONFIG_FILE}; give the one --project-dir of "
                "tools/retro/build_db.py"
            )
        return config
    data = config.data
    tokenizer = None if project.tokenizer is None else _in_project(folder, project.tokenizer)
    if (
        data.tokenizer is not None
        and tokenizer is not None
        and Path(data.tokenizer).resolve() != Path(tokenizer).resolve()
    ):
        where = origins.get("data.tokenizer", "configuration")
        raise ConfigError(
            f"{where}: data.tokenizer {data.tokenizer} is not that of data.retro_project {folder}, {tokenizer}; "
            "leave it out"
        )
    documents = [_in_project(folder, prefix, ".idx") for prefix in project.query_paths or project.data_paths]
    held_out = {Path(prefix).resolve() for prefix in data.valid}
    documents = [prefix for prefix in documents if Path(prefix).resolve() not in held_out]
    if files and not (data.generative or data.valid):
        _warn_of_others(config, folder, project)
    data = dataclasses.replace(data, tokenizer=data.tokenizer or tokenizer, generative=data.generative or documents)
    # Neighbors are those of whole chunks: a piece that began within one would have none.
    if data.split_multiple % project.chunk_length:
        data.split_multiple = project.chunk_length
    if not config.model.retro.num_neighbors:
        return dataclasses.replace(config, data=data)
    if data.retro_version is None:
        data.retro_version = _version_of_checkpoint(config) or max(version_numbers(folder), default=None)
    retro = config.model.retro
    if "model.retro.chunk_length" not in origins:
        retro = dataclasses.replace(retro, chunk_length=project.chunk_length)
    return dataclasses.replace(config, data=data, model=dataclasses.replace(config.model, retro=retro))


def _warn_of_others(config: RunConfig, folder: Path, project: RetroDbConfig) -> None:
    """Tell a new run of files that get neighbors and, unlike others, are no documents of the database, as held-out ones
    are."""
    own = {Path(_in_project(folder, prefix, ".idx")).resolve() for prefix in project.data_paths}
    others = [_in_project(folder, prefix, ".idx") for prefix in project.query_paths]
    others = [prefix for prefix in others if Path(prefix).resolve() not in own]
    if 0 < len(others) < len(project.query_paths) and not (
        config.checkpoint.resume and list_checkpoints(config.output_dir)
    ):
        log.warning(
            f"data.retro_project {folder}: trains on {', '.join(others)} too, of its query_paths and not of its "
            "data_paths; if they are held out, give them as data.valid"
        )


def _version_of_checkpoint(config: RunConfig) -> int | Literal["newest"] | None:
    """What the checkpoint that the run resumes from has as data.retro_version."""
    found = list_checkpoints(config.output_dir) if config.checkpoint.resume else []
    if not found or not (found[-1] / "config.yaml").is_file():
        return None
    saved = load_config(found[-1] / "config.yaml")
    return saved.data.retro_version if saved.model.retro.num_neighbors else None


def _in_project(folder: Path, path: str, suffix: str = "") -> str:
    """A path of config.json: below the project directory, or as it is given."""
    own = folder / path
    return str(own) if Path(f"{own}{suffix}").exists() else path
