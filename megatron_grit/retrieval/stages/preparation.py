"""What is checked before a build removes or computes anything, and what a dry run says of it."""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_grit.config.database.schema import CONFIG_FILE, RetroDbConfig, config_problems, load_project_config
from megatron_grit.config.database.stages import (
    FILES,
    FOLDERS,
    STAGES,
    built_stages,
    changed_settings,
    expand_tasks,
    same_value,
    with_following,
)
from megatron_grit.data.chunks.chunk_db import ChunkDb
from megatron_grit.data.chunks.project import Project
from megatron_grit.data.chunks.versions import (
    Version,
    give_up_versions,
    next_version_number,
    read_version,
    version_numbers,
)
from megatron_grit.data.indexed.reader import file_paths
from megatron_grit.errors import ConfigError, DataError
from megatron_grit.inference.encoders.protocol import Embedder
from megatron_grit.retrieval.index.faiss_index import gpus_of_process
from megatron_grit.retrieval.index.recall_queries import RecallQueries
from megatron_grit.retrieval.stages.chunk import refuse_other_sources
from megatron_grit.retrieval.stages.index import check_index
from megatron_grit.store.logs import get_logger

log = get_logger(__name__)

MAKING = STAGES[:-1]
"""Stages that make what versions are made of."""


class Preparation:
    """What a command asks for, and what it finds. Reads settings and versions; :meth:`check` looks at the rest.

    Args:
        folder: the project directory.
        tasks: comma list.
        given: settings that are not those of the directory.
        overwrite: comma list of tasks that are done again from nothing.
        validate: share of the blocks that is computed again, instead of building.
        tombstone: documents to remove.

    Attributes:
        stages: of the tasks, in their order.
        overwritten: of them, those that are done again.
        old: settings of the directory; None where it has none.
        wanted: settings that are asked for.
        kept: the same until documents were added: with the datasets that are there.
        version: the newest of the database; None where there is none.

    Raises:
        ConfigError: a wrong setting or task, or what would lose documents.
        DataError: a file of the directory is damaged.
    """

    def __init__(
        self,
        folder: Path,
        tasks: str,
        given: Mapping[str, Any],
        *,
        overwrite: str = "",
        validate: float | None = None,
        tombstone: str = "",
    ) -> None:
        self.folder, self.validate = folder, validate
        self.stages = expand_tasks(tasks)
        self.overwritten = expand_tasks(overwrite) if overwrite else []
        self._check_tasks(tombstone)
        self.old = load_project_config(folder)
        self._check_folder()
        self.version = read_version(folder) if version_numbers(folder) else None
        self.wanted = dataclasses.replace(self.old or RetroDbConfig(), **given)
        problem = next(config_problems(self.wanted), None)
        if problem is not None:
            raise ConfigError(problem)
        self.kept = self.wanted
        self._compare_settings("data_paths" in given)
        self._refuse_losses()
        self._check_version("version" in given)
        if self.wanted.index_on_gpu and "query-neighbors" in self.stages:
            gpus_of_process()  # refused here where there are none

    @property
    def needs_embedder(self) -> bool:
        """Whether one of the tasks embeds texts."""
        return any(stage not in ("db-build", "tombstone") for stage in self.stages)

    @property
    def is_grown(self) -> bool:
        """Whether documents were added, or will be: what the database was built of then stays as it is."""
        if self.version is None or "db-build" in self.overwritten:
            return False
        return len(self.version.segments) > 1 or "add" in self.stages

    def _check_tasks(self, tombstone: str) -> None:
        for stage in self.overwritten:
            if stage not in self.stages:
                raise ConfigError(f"overwrite names {stage}, which is not among the tasks {', '.join(self.stages)}")
        if self.validate is not None and self.overwritten:
            raise ConfigError("validate compares and overwrites nothing")
        if self.validate is not None and not 0 < self.validate <= 1:
            raise ConfigError(f"validate must be above 0 and at most 1, not {self.validate}")
        if ("tombstone" in self.stages) != bool(tombstone):
            raise ConfigError("the task tombstone goes with --tombstone DATASET:DOCUMENT[,...] or a file of them")

    def _check_folder(self) -> None:
        """A directory is ours by its config.json; in another one nothing is made or removed."""
        if self.old is not None:
            return
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
        old, wanted, growing = self.old, self.wanted, "add" in self.stages
        if old is None:
            return
        there: list[str] | None = None
        if self.version is not None:
            there = [source.prefix for source in self.version.sources]
        elif growing and built_stages(self.folder):
            there = old.data_paths
        if there is not None and "db-build" not in self.overwritten:
            shorter = min(len(there), len(old.data_paths))
            if same_value("data_paths", there[:shorter], old.data_paths[:shorter]):
                if not given_paths and len(old.data_paths) < len(there):
                    wanted = dataclasses.replace(wanted, data_paths=there)
                old = dataclasses.replace(old, data_paths=there)
            if same_value("data_paths", wanted.data_paths[: len(there)], there):
                # As versions spell them.
                wanted = dataclasses.replace(wanted, data_paths=there + wanted.data_paths[len(there) :])
                self.kept = dataclasses.replace(wanted, data_paths=there) if growing else wanted
            else:
                self.kept = wanted
            self.wanted = wanted
        problem = next(changed_settings(old, self.kept, built_stages(self.folder), self.overwritten), None)
        if problem is not None:
            raise ConfigError(f"{self.folder}: {problem}")

    def _refuse_losses(self) -> None:
        version, lost = self.version, with_following(self.overwritten) & set(MAKING)
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
        if number is None or not (given or "query-neighbors" in self.stages):
            return
        first = number == next_version_number(self.folder) and {"index-add", "query-neighbors"} & set(self.stages)
        if not (first and self.version is None):
            read_version(self.folder, number)

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
        if self.stages == ["tombstone"]:
            return []
        project = Project(self.folder, self.wanted)
        lines = [f"tokenizer: {project.tokenizer.path}, {project.tokenizer.vocab_size:,} tokens"]
        lines += self._check_data(project)
        making = set(self.stages) & set(MAKING)
        if making and self.validate is None and "db-build" not in self.overwritten and "add" not in self.stages:
            refuse_other_sources(project)
        if embedder is not None:
            lines.append(f"embedder: {self.wanted.embedder}, {embedder.dim} channels")
            self._check_embedder(embedder)
            if {"embed", "index-train", "index-add"} & making and not self.is_grown:
                lines.append(self._check_index(project, embedder))
        return lines

    def _check_data(self, project: Project) -> Iterator[str]:
        config = self.wanted
        changing = {"db-build", "add"} & set(self.stages)
        if changing and not config.data_paths:
            raise ConfigError("data_paths is empty; give the prefixes of indexed files")
        queries = config.query_paths if {"index-add", "query-neighbors"} & set(self.stages) else []
        unknown, places = [], []
        for prefix in dict.fromkeys([*config.data_paths, *queries]):
            file, path = project.open(prefix), project.resolve(prefix)
            if not file_paths(path)[2].is_file():
                unknown.append(str(path))
            if changing and prefix in config.data_paths:
                if path.resolve() in places:
                    raise ConfigError(f"data_paths names {path.resolve()} more than once, the second time as {prefix}")
                places.append(path.resolve())
            yield f"documents: {prefix}, {file.num_documents:,}, {file.bin_bytes // file.dtype.itemsize:,} tokens"
        if changing and unknown:
            log.warning(
                f"without a .json nothing tells whether {', '.join(unknown)} was made with tokenizer "
                f"{project.tokenizer.path}"
            )
        if config.recall_queries is not None and {"index-train", "index-add"} & set(self.stages):
            RecallQueries(project, "", "").source()

    def _check_embedder(self, embedder: Embedder) -> None:
        if self.version is None or "index-train" in with_following(self.overwritten):
            return
        version: Version = self.version
        if self.wanted.version is not None and set(self.stages) == {"query-neighbors"}:
            version = read_version(self.folder, self.wanted.version)
        if version.embedder != embedder.fingerprint:
            raise DataError(
                f"is another embedder than that of version {version.number} of the database, or was changed since; "
                "give that one, or build again with --overwrite embed,index-train",
                path=str(self.wanted.embedder),
            )

    def _check_index(self, project: Project, embedder: Embedder) -> str:
        count, at_most = self._num_chunks(project)
        factory, num_train = check_index(self.wanted, embedder.dim, count, at_most=at_most)
        if factory == "auto":
            return "index: auto, chosen when the number of chunks is known"
        trained = f", trained on {num_train:,}" if num_train else ""
        return f"index: {factory} of {'at most ' if at_most else ''}{count:,} chunks{trained}"

    def _num_chunks(self, project: Project) -> tuple[int, bool]:
        """Chunks of the database, and whether they may be fewer."""
        if "db-build" not in self.overwritten:
            try:
                return len(ChunkDb(project)), False
            except DataError:  # not built, or to be built again
                pass
        files = [project.open(prefix) for prefix in self.wanted.data_paths]
        length = self.wanted.chunk_length
        return sum(file.bin_bytes // file.dtype.itemsize // length + file.num_documents for file in files), True

    def check_mesh(self, num_processes: int) -> None:
        """See that an embedder that is spread over processes can be.

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

    def losses(self) -> list[str]:
        """What overwriting takes away, a line each."""
        numbers, gone = version_numbers(self.folder), []
        for stage in self._removed_stages():
            paths = [path for pattern in FILES[stage] for path in sorted(self.folder.glob(pattern))]
            gone += [str(path.relative_to(self.folder)) for path in paths if path.parent.name != "versions"]
        lines = [f"overwrite removes {', '.join(gone)}"] if gone else []
        named = f"version{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))} of the database"
        if numbers and "db-build" in self.overwritten:
            number = next_version_number(self.folder)
            lines.append(f"overwrite gives up {named}: what reads it cannot go on; the next one is {number}")
        elif numbers and {"index-train", "index-add"} & set(self.overwritten):
            lines.append(f"overwrite takes the index of {named}; the neighbors that were found stay")
        return lines

    def _removed_stages(self) -> list[str]:
        # What follows goes first: a kill leaves nothing that belongs to what is gone.
        return [stage for stage in reversed(FILES) if stage in with_following(self.overwritten)]

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
            give_up_versions(self.folder)
        for stage in self._removed_stages():
            for pattern in FILES[stage]:
                for path in sorted(self.folder.glob(pattern)):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()

    def kept_after_adding(self) -> RetroDbConfig:
        """The settings to keep when the task add is done: with the datasets that the newest version then holds."""
        there = [source.prefix for source in read_version(self.folder).sources]
        return self.wanted if there == self.wanted.data_paths else self.kept

    def outline(self) -> list[str]:
        """What each task finds, a line each."""
        there, lines = built_stages(self.folder), []
        number = "no version yet" if self.version is None else f"version {self.version.number}"
        count = "" if self.version is None else f", {self.version.num_chunks:,} chunks"
        lines.append(f"project: {self.folder}, " + ("new" if self.old is None else number + count))
        for stage in self.stages:
            if self.validate is not None:
                state = f"{self.validate:.3g} of its blocks would be computed again and compared"
            elif stage in MAKING and self.is_grown:
                state = "left as it is: documents were added, or are by the task add"
            elif stage in with_following(self.overwritten):
                state = "again, from nothing"
            elif stage in there:
                state = "there; what is missing or damaged is made"
            else:
                state = "to do"
            lines.append(f"task {stage}: {state}")
        return lines
