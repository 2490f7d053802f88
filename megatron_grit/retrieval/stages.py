"""The tasks of a database build, in order, each of which goes on where it was stopped."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megatron_grit.config.retro_db import (
    RetroDbConfig,
    config_problems,
    load_project_config,
    save_project_config,
)
from megatron_grit.data.retro_project import Project
from megatron_grit.errors import ConfigError
from megatron_grit.parallel.logs import get_logger
from megatron_grit.retrieval.chunk import build_chunks
from megatron_grit.retrieval.embed import Embedder, load_embedder
from megatron_grit.retrieval.index import add_to_index, train_index
from megatron_grit.retrieval.query import query_neighbors
from megatron_grit.retrieval.work import Worker, worker

log = get_logger(__name__)

TASKS: dict[str, tuple[str, ...]] = {
    "build": ("db-build", "index-train", "index-add", "query-neighbors"),
    "index-build": ("index-train", "index-add"),
    "query-pretraining-neighbors": ("query-neighbors",),
}
"""Names that stand for other tasks."""
STAGES = ("db-build", "index-train", "index-add", "query-neighbors")


def expand_tasks(text: str) -> list[str]:
    """The stages of a comma list, in their order, each once.

    Raises:
        ConfigError: a name that is no task.
    """
    wanted: set[str] = set()
    for name in text.split(","):
        names = TASKS.get(name.strip(), (name.strip(),))
        for stage in names:
            if stage not in STAGES:
                raise ConfigError(f"no task {stage!r}; there are {', '.join([*TASKS, *STAGES])}")
        wanted.update(names)
    return [stage for stage in STAGES if stage in wanted]


def run_tasks(project_dir: Path, tasks: str, given: Mapping[str, Any]) -> None:
    """Build a database, or the part of it that tasks name. Under torchrun all processes call it.

    Args:
        project_dir: the database's directory; its config.json is made, or read and completed.
        tasks: comma list of tasks.
        given: settings of :class:`RetroDbConfig` that are not those of the directory, or of the defaults.

    Raises:
        ConfigError: a wrong setting.
        DataError: a missing or damaged input.
    """
    stages = expand_tasks(tasks)
    config = load_project_config(project_dir) or RetroDbConfig()
    config = dataclasses.replace(config, **given)
    problem = next(config_problems(config), None)
    if problem is not None:
        raise ConfigError(problem)
    with worker() as this:
        if this.is_first:
            project_dir.mkdir(parents=True, exist_ok=True)
            save_project_config(config, project_dir)
        project = Project(project_dir, config)
        embedder: Embedder | None = None
        for stage in stages:
            if this.is_first:
                log.info(f"task {stage}")
            if stage == "db-build":
                build_chunks(project, this)
                continue
            embedder = embedder or project_embedder(config)
            _WITH_EMBEDDER[stage](project, this, embedder)


_WITH_EMBEDDER: dict[str, Callable[[Project, Worker, Embedder], None]] = {
    "index-train": train_index,
    "index-add": add_to_index,
    "query-neighbors": query_neighbors,
}


def project_embedder(config: RetroDbConfig) -> Embedder:
    """The embedder that a configuration names.

    Raises:
        ConfigError: it names none, or none that can be loaded.
    """
    if config.embedder is None:
        raise ConfigError("embedder is not set; give the directory of an encoder or of one of our checkpoints")
    return load_embedder(
        config.embedder,
        pooling=config.embedder_pooling,
        max_length=config.embedder_max_length,
        batch_tokens=config.batch_tokens,
        precision=config.embedder_precision,
        query_instruction=config.query_instruction,
    )
