"""A run that takes newer versions of its retrieval database: rank 0 looks for them, and all ranks hear of one after the
same step."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_grit.config.database.schema import version_numbers
from megatron_grit.config.schema import RunConfig
from megatron_grit.data.rows.loader import GritDataLoader
from megatron_grit.data.rows.neighbor_versions import NEWEST, first_version
from megatron_grit.errors import GritError
from megatron_grit.parallel.collectives import from_rank_0
from megatron_grit.parallel.context import ParallelContext
from megatron_grit.store.digest import stopped_by
from megatron_grit.store.logs import get_logger

SECONDS = 5.0
"""Between two looks."""

log = get_logger(__name__)


class VersionFollower:
    """Says which version a run begins with, and takes newer ones between steps with ``data.retro_version newest``.

    A version is opened in a thread on rank 0 before it is announced, so that no step waits for a large table to be
    compared with its checksums. One whose neighbors were not searched yet is passed over.

    Args:
        config: the run.
        context: this process's place in the mesh.
        loader: of this process.
        others: that read the same version; one is taken when they can read it too.
    """

    def __init__(
        self,
        config: RunConfig,
        context: ParallelContext,
        loader: GritDataLoader,
        others: Sequence[GritDataLoader] = (),
    ) -> None:
        self._config, self._folder = config, Path(config.data.retro_project or "")
        self._context, self._loader, self._others = context, loader, others
        self._reads = bool(loader.neighbors)
        self._follows = self._reads and config.data.retro_version == NEWEST
        self._told: set[int] = set()
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        self.found = 0
        """Newest version that rank 0 can read."""

    def start(self, record: Sequence[Mapping[str, Any]] | None) -> None:
        """Begin with what a checkpoint read, or where there is none with what rank 0 can read. Collective.

        Args:
            record: of :meth:`GritDataLoader.versions_read`; the same on all ranks. Only with ``newest``: another run
                reads what ``data.retro_version`` says, and is compared with it.

        Raises:
            ConfigError, DataError: there is no version that all loaders can read.
        """
        if not self._reads:
            return
        if record and self._follows:
            self._loader.read_versions(record)
        else:
            every = [versions for loader in (self._loader, *self._others) for versions in loader.neighbors]
            first = first_version(self._config, every) if self._context.rank == 0 else 0
            self._loader.read_versions([{"first_step": 0, "version": from_rank_0(first, self._context)}])
        self.found = int(self._loader.versions_read()[-1]["version"])
        if self._config.data.neighbors == "contexts":
            log.info("neighbors are the contexts beside the questions")
            return
        newer = ", and from newer ones as they come" if self._follows else ""
        log.info(f"neighbors are read from version {self.found} of {self._folder}{newer}")

    def newest(self) -> int:
        """The newest version that this process can read, on rank 0; 0 on others, and where none is looked for."""
        if not self._follows or self._context.rank:
            return 0
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="grit-retro-versions", daemon=True)
            self._thread.start()
        return self.found

    def take(self, number: int, num_trained: int) -> None:
        """Read a version from the next possible step on, if it is a newer one and the run has such a step.

        Args:
            number: what :meth:`newest` said on rank 0; the same on all ranks.
            num_trained: steps that were trained.
        """
        if not self._follows or number <= int(self._loader.versions_read()[-1]["version"]):
            return
        if num_trained + self._loader.num_ahead >= self._config.training.steps:
            return
        first = self._loader.change_version(number, num_trained)
        log.info(f"neighbors are read from version {number} of {self._folder} from step {first + 1} on")

    def look(self) -> None:
        """Open the newest of the versions that came since."""
        for number in reversed([number for number in version_numbers(self._folder) if number > self.found]):
            try:
                for loader in (self._loader, *self._others):
                    loader.open_version(number)
            except Exception as error:  # a version in the making may break in any way; the thread looks again later
                if self._stopped.is_set():
                    return
                if number not in self._told:
                    self._told.add(number)
                    why = error if isinstance(error, GritError) else repr(error)
                    log.info(f"version {number} of {self._folder} is not read yet: {why}")
                continue
            self.found = number
            return

    def _work(self) -> None:
        with stopped_by(self._stopped):
            while not self._stopped.wait(SECONDS):
                self.look()

    def close(self) -> None:
        """Stop looking, within a block of a file that is being compared with its checksum."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()
