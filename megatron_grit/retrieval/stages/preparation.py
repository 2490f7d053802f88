"""What is checked before a build removes or computes anything, and what a dry run says of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_grit.config.blend import read_blend
from megatron_grit.config.database.schema import (
    CONFIG_FILE,
    RetroDbConfig,
    config_problems,
    load_project_config,
    version_numbers,
)
from megatron_grit.config.database.settings import same_value
from megatron_grit.config.values import is_of, shortened
from megatron_grit.data.chunks.project import Project
from megatron_grit.data.chunks.versions import give_up_versions, next_version_number, read_version
from megatron_grit.errors import ConfigError, DataError
from megatron_grit.inference.encoders.protocol import Embedder
from megatron_grit.retrieval.stages.db_build import refuse_other_sources
from megatron_grit.retrieval.stages.task import Inputs, Task
from megatron_grit.retrieval.stages.tasks import TASKS, changed_settings, expand_tasks, with_following
from megatron_grit.store.logs import get_logger

log = get_logger(__name__)

FOLDERS = ("db", "embeddings", "index", "query")
"""Of a project directory that are ours."""


class Preparation:
    """What a command asks for, and what it finds. Reads settings and versions; :meth:`check` looks at the rest.

    Args:
        project_dir: the database's directory; its config.json is made, or read and completed.
        tasks: comma list of tasks.
        given: settings of :class:`RetroDbConfig` that are not those of the directory, or the defaults.
        overwrite: comma list of tasks that start from nothing, and with them what follows from them.
        validate: compute this share of the blocks of each task again and compare, instead of building.
        tombstone: documents that the task tombstone removes, as :func:`remove_documents` takes them.

    Attributes:
        tasks: names, in the order in which they run.
        overwritten: of them, those that start from nothing.
        old: settings of the directory; None where it has none.
        wanted: settings that are asked for.
        kept: the settings to write before documents are added: ``wanted`` with the datasets that are there.
        version: the newest of the database; None where there is none.

    Raises:
        ConfigError: a wrong setting or task, or what would lose documents.
        DataError: a file of the directory is damaged.
    """

    def __init__(
        self,
        project_dir: Path,
        tasks: str,
        given: Mapping[str, Any],
        *,
        overwrite: str = "",
        validate: float | None = None,
        tombstone: str = "",
    ) -> None:
        folder = self.folder = project_dir
        self.validate, self.tombstone = validate, tombstone
        self.tasks = expand_tasks(tasks)
        self.overwritten = expand_tasks(overwrite) if overwrite else []
        self._check_tasks()
        self.old = load_project_config(folder)
        self._check_folder()
        self.version = read_version(folder) if version_numbers(folder) else None
        self.wanted = replace(self.old or RetroDbConfig(), **{**given, **_paths_of_blends(given)})
        problem = next(config_problems(self.wanted), None)
        if problem is not None:
            raise ConfigError(problem)
        self.kept = self.wanted
        self._compare_settings("data_paths" in given)
        self._refuse_losses()
        self._check_version("version" in given)

    @property
    def needs_embedder(self) -> bool:
        """Whether one of the tasks embeds texts."""
        return any(TASKS[name].needs_embedder for name in self.tasks)

    @property
    def is_grown(self) -> bool:
        """Whether documents were added, or will be: what the database was built of then stays as it is."""
        if self.version is None or "db-build" in self.overwritten:
            return False
        return len(self.version.segments) > 1 or "add" in self.tasks

    def _check_tasks(self) -> None:
        for name in self.overwritten:
            if name not in self.tasks:
                raise ConfigError(f"overwrite names {name}, which is not among the tasks {', '.join(self.tasks)}")
        if self.validate is not None and self.overwritten:
            raise ConfigError("validate compares and overwrites nothing")
        if self.validate is not None and not (is_of(float, self.validate) and 0 < self.validate <= 1):
            raise ConfigError(f"validate must be above 0 and at most 1, not {shortened(self.validate)}")
        if ("tombstone" in self.tasks) != bool(self.tombstone):
            raise ConfigError("the task tombstone goes with --tombstone DATASET:DOCUMENT[,...] or a file of them")

    def _check_folder(self) -> None:
        """A directory is ours by its config.json; in another one nothing is made or removed."""
        if self.old is not None:
            return
        if self.folder.exists() and not self.folder.is_dir():
            raise ConfigError(f"{self.folder}: is a file; give the directory of a database or a new one")
        if self.validate is not None:
            raise ConfigError(f"{self.folder}: holds no {CONFIG_FILE}, so there is nothing to validate")
        found = [name for name in FOLDERS if (self.folder / name).is_dir() and any((self.folder / name).iterdir())]
        if found:
            raise ConfigError(
                f"{self.folder}: holds {', '.join(found)} and no {CONFIG_FILE}, so it is no project directory; give "
                f"that of a database or a new one, or put {CONFIG_FILE} back"
            )

    def _compare_settings(self, given_paths: bool) -> None:
        """Compare with what was built; data_paths with what the newest version holds, since an addition may not have
        come to its end."""
        old, wanted, growing = self.old, self.wanted, "add" in self.tasks
        if old is None:
            return
        there: list[str] | None = None
        if self.version is not None:
            there = [source.prefix for source in self.version.sources]
        elif growing and self.begun():
            there = old.data_paths
        if there is not None and "db-build" not in self.overwritten:
            shorter = min(len(there), len(old.data_paths))
            if same_value("data_paths", there[:shorter], old.data_paths[:shorter]):
                if not given_paths and len(old.data_paths) < len(there):
                    wanted = replace(wanted, data_paths=there)
                old = replace(old, data_paths=there)
            if same_value("data_paths", wanted.data_paths[: len(there)], there):
                # As versions spell them.
                wanted = replace(wanted, data_paths=there + wanted.data_paths[len(there) :])
                self.kept = replace(wanted, data_paths=there) if growing else wanted
            else:
                self.kept = wanted
            self.wanted = wanted
        problem = next(changed_settings(old, self.kept, self.begun(), self.overwritten), None)
        if problem is not None:
            raise ConfigError(f"{self.folder}: {problem}")

    def _refuse_losses(self) -> None:
        version, lost = self.version, {name for name in with_following(self.overwritten) if TASKS[name].makes_versions}
        if version is None or not lost:
            return
        again = f"{self.folder}: --overwrite {','.join(self.overwritten)}"
        if len(version.segments) > 1:
            raise ConfigError(
                f"{again} would lose the documents that were added since the index was trained; to train one on all of "
                "them, build another project directory"
            )
        if version.num_tombstones and "db-build" in lost:
            raise ConfigError(
                f"{again} would bring back {version.num_tombstones} removed documents; build another project directory "
                "and remove them there, or build it of files without them"
            )
        if self.wanted.version is not None and lost != {"embed"}:
            raise ConfigError(
                f"{again} would make anew what version {self.wanted.version} is made of, which config.json names; "
                "build another project directory, or give it up with --version null"
            )

    def _check_version(self, given: bool) -> None:
        number = self.wanted.version
        if number is None or not (given or "query-neighbors" in self.tasks):
            return
        first = number == next_version_number(self.folder) and {"index-add", "query-neighbors"} & set(self.tasks)
        if not (first and self.version is None):
            read_version(self.folder, number)

    def begun(self) -> list[str]:
        """Tasks that made something here."""
        return [task.name for task in TASKS.values() if task.is_begun(self.folder)]

    def leaves(self, task: Task) -> bool:
        """Whether a task has nothing to do, because documents were added to what it made, or will be."""
        return task.makes_versions and self.is_grown

    def check(self, embedder: Embedder | None) -> list[str]:
        """Look at everything that the tasks read. In one process.

        Args:
            embedder: that of the database; None where no task embeds, or it was not loaded.

        Returns:
            What was found, a line each.

        Raises:
            ConfigError: settings that do not go with the data or the embedder.
            DataError: an input that is missing, damaged or another one than before.
        """
        if self.tasks == ["tombstone"]:
            return []
        project, rebuilds = Project(self.folder, self.wanted), "db-build" in self.overwritten
        lines = [f"tokenizer: {project.tokenizer.path}, {project.tokenizer.vocab_size:,} tokens"]
        lines += map(project.outline, self.wanted.data_paths)
        makes_versions = any(TASKS[name].makes_versions for name in self.tasks)
        if makes_versions and self.validate is None and not rebuilds and "add" not in self.tasks:
            refuse_other_sources(project)
        if embedder is not None:
            lines.append(f"embedder: {self.wanted.embedder}, {embedder.dim} channels")
            self._check_embedder(embedder)
        inputs = Inputs(project, self.is_grown, rebuilds, embedder)
        # A line that several tasks have to say is said once.
        return list(dict.fromkeys([*lines, *(line for name in self.tasks for line in TASKS[name].check(inputs))]))

    def _check_embedder(self, embedder: Embedder) -> None:
        if self.version is None or "index-train" in with_following(self.overwritten):
            return
        version = self.version
        if self.wanted.version is not None and set(self.tasks) == {"query-neighbors"}:
            version = read_version(self.folder, self.wanted.version)
        if version.embedder != embedder.fingerprint:
            raise DataError(
                f"is another embedder than that of version {version.number} of the database, or was changed since; "
                "give that one, or build again with --overwrite embed,index-train",
                path=str(self.wanted.embedder),
            )

    def check_mesh(self, num_processes: int) -> None:
        """Check that the embedder can be sharded over this many processes.

        Raises:
            ConfigError: not over so many.
        """
        config = self.wanted
        data = math.lcm(config.embedder_context, config.embedder_expert)
        size = config.embedder_tensor * config.embedder_pipeline * data
        if num_processes % size:
            raise ConfigError(
                f"embedder_tensor {config.embedder_tensor}, embedder_pipeline {config.embedder_pipeline}, "
                f"embedder_context {config.embedder_context} and embedder_expert {config.embedder_expert} need a "
                f"multiple of {size} processes, not {num_processes}"
            )

    def _removed(self) -> list[Task]:
        """Tasks whose files are removed. What follows goes first: after a kill nothing is left of what is gone."""
        lost = with_following(self.overwritten)
        return [task for task in reversed(TASKS.values()) if task.name in lost]

    def losses(self) -> list[str]:
        """What overwriting takes away, a line each."""
        numbers, folder = version_numbers(self.folder), self.folder
        paths = [path for task in self._removed() for path in task.found(folder) if path.parent.name != "versions"]
        lines = [f"overwrite removes {', '.join(str(path.relative_to(folder)) for path in paths)}"] if paths else []
        named = f"version{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))} of the database"
        if numbers and "db-build" in self.overwritten:
            number = next_version_number(folder)
            lines.append(f"overwrite gives up {named}: whatever reads it cannot resume; the next one is {number}")
        elif numbers and {"index-train", "index-add"} & set(self.overwritten):
            lines.append(f"overwrite takes the index of {named}; the neighbors that were found stay")
        return lines

    def remove(self) -> None:
        """Remove what is made again, and what runs that were killed have left. In one process."""
        for line in self.losses():
            log.warning(line)
        for folder in FOLDERS:
            for path in (self.folder / folder).rglob(".*.tmp"):
                path.unlink(missing_ok=True)
        for path in self.folder.glob(f".{CONFIG_FILE}.*.tmp"):
            path.unlink(missing_ok=True)
        if "db-build" in self.overwritten:
            # First of all: a kill then leaves no version whose files are gone.
            give_up_versions(self.folder)
        for task in self._removed():
            task.remove(self.folder)

    def kept_after_adding(self) -> RetroDbConfig:
        """The settings to keep when the task add is done: with the datasets that the newest version then holds."""
        there = [source.prefix for source in read_version(self.folder).sources]
        return self.wanted if there == self.wanted.data_paths else self.kept

    def outline(self) -> list[str]:
        """What each task finds, a line each."""
        begun, lost = self.begun(), with_following(self.overwritten)
        number = "no version yet" if self.version is None else f"version {self.version.number}"
        count = "" if self.version is None else f", {self.version.num_chunks:,} chunks"
        lines = [f"project: {self.folder}, " + ("new" if self.old is None else number + count)]
        for name in self.tasks:
            if self.validate is not None:
                state = f"{self.validate:.3g} of its blocks would be computed again and compared"
            elif self.leaves(TASKS[name]):
                state = "left as it is: documents were added, or are by the task add"
            elif name in lost:
                state = "again, from nothing"
            elif name in begun:
                state = "there; what is missing or damaged is made"
            else:
                state = "to do"
            lines.append(f"task {name}: {state}")
        return lines


def _paths_of_blends(given: Mapping[str, Any]) -> dict[str, Any]:
    """Prefixes of what ``data.generative`` of a run may say. A database holds every document once.

    Raises:
        ConfigError: no blend, or one with a cap.
    """
    found = {}
    for key in ("data_paths", "query_paths"):
        entries = read_blend(given.get(key) or [], key)
        if any(entry.cap is not None for entry in entries):
            raise ConfigError(f"{key}: a database has no cap of a source; write another indexed file for it")
        if any(entry.weight is not None or entry.epochs is not None for entry in entries):
            log.info(f"{key}: weights and epochs are left aside, as a database holds each document once")
        if entries:
            found[key] = [entry.path for entry in entries]
    return found
