"""What every task of a database build has. :mod:`tasks` lists them; whoever runs, checks or shows a database walks that
list."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_grit.data.chunks.chunk_db import ChunkDb
from megatron_grit.data.chunks.project import Project
from megatron_grit.data.chunks.versions import Version
from megatron_grit.inference.encoders.protocol import Embedder
from megatron_grit.retrieval.work import Check, Worker

EMBEDDER_SETTINGS = ("embedder", "embedder_pooling", "embedder_max_length", "embedder_precision", "embedding_dtype")
"""That all vectors of a database follow from."""
WARNING = "warning: "
"""With which a line of :meth:`Task.check` begins that a build logs as well."""
Report = dict[str, Any]
"""What JSON can hold."""
MOST_TO_COUNT = 10_000_000
"""Chunks up to which rows of a database are counted to describe it; that reads all of them."""


@dataclass(frozen=True)
class Job:
    """A task at work in this process."""

    project: Project
    worker: Worker
    loaded: Embedder | None = None
    tombstone: str = ""
    """Documents to remove, as the command names them."""

    @property
    def embedder(self) -> Embedder:
        """The embedder, of a task that needs one."""
        assert self.loaded is not None, "the task does not say that it needs an embedder"
        return self.loaded


@dataclass(frozen=True)
class Inputs:
    """What a task checks before anything is removed or computed."""

    project: Project
    is_grown: bool
    """Whether documents were added, or will be: what the database was built of then stays as it is."""
    rebuilds: bool
    """Whether chunks are cut again."""
    embedder: Embedder | None


class Task:
    """A task of a build. Subclasses say what it makes, and how."""

    name: str
    needs_embedder = True
    makes_versions = False
    """Whether the first version of the database is made of its files."""
    settings: tuple[str, ...] = ()
    """Settings that it fixes once something was built with them."""
    voids: tuple[str, ...] = ()
    """Tasks whose results are lost when this one starts from nothing."""
    makes: tuple[str, ...] = ()
    """Files and folders that it writes, as patterns in the project directory."""
    trace: str | None = None
    """A pattern of files that are there once it made something."""

    def is_begun(self, folder: Path) -> bool:
        """Whether it made something in a project directory."""
        return self.trace is not None and any(folder.glob(self.trace))

    def found(self, folder: Path) -> Iterator[Path]:
        """The files and folders of a project directory that it made."""
        for pattern in self.makes:
            yield from sorted(folder.glob(pattern))

    def remove(self, folder: Path) -> None:
        """Remove what it made. In one process."""
        for path in self.found(folder):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def check(self, inputs: Inputs) -> Iterable[str]:
        """See whether it can be done, before anything is removed or computed. In one process.

        Returns:
            What was found, a line each.

        Raises:
            ConfigError: settings that do not go with the data or the embedder.
            DataError: an input that is missing or damaged.
        """
        return ()

    def run(self, job: Job) -> None:
        """Do it, or what a killed run left of it. All processes call it."""
        raise NotImplementedError

    def validate(self, job: Job) -> Iterable[Check]:
        """Blocks to compare with what is computed now; tables that are made of them are compared with their checksums
        on the way. All processes call it.

        Raises:
            DataError: a table is missing or damaged.
        """
        raise NotImplementedError

    def describe(self, db: ChunkDb, version: Version | None, *, verify: bool) -> Report:
        """What it made, for :mod:`inspect`.

        Args:
            db: chunks of the version, or those that were built where there is none yet.
            version: None: there is none yet.
            verify: read files whole and compare their checksums.

        Raises:
            DataError: a file is missing or damaged.
        """
        return {}
