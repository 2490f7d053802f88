"""Which version of a retrieval database each step of a run reads its neighbors from.

The contexts beside questions, which are read in place of neighbors with ``data.neighbors contexts``, are one version.

A version is taken from a step on that no rank has made rows of yet, so all ranks change at the same step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_grit.config.database.schema import version_numbers
from megatron_grit.config.schema import RunConfig
from megatron_grit.data.order.sources import Sources
from megatron_grit.data.qa.context_reader import ContextReader
from megatron_grit.data.rows.neighbor_reader import NeighborReader
from megatron_grit.errors import GritError
from megatron_grit.store.logs import get_logger

NEWEST = "newest"
"""Value of ``data.retro_version``: newer versions are taken while the run goes on."""

log = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class VersionChange:
    """From a step on, neighbors are those of a version."""

    first_step: int
    """From 0."""
    version: int


class NeighborVersions:
    """Readers of the neighbors of one stream of rows, by step.

    Args:
        config: the run, with ``model.retro.num_neighbors`` above 0.
        sources: of the rows.

    Attributes:
        changes: by first step, which is 0 for the first of them; empty before :func:`first_version`.
        identities: of the versions that were opened, see :meth:`NeighborReader.identity`.
    """

    def __init__(self, config: RunConfig, sources: Sources) -> None:
        self._config, self._sources = config, sources
        self._readers: dict[int, NeighborReader | ContextReader] = {}
        self.identities: dict[int, str] = {}
        self.changes: list[VersionChange] = []

    def open(self, version: int | None) -> int:
        """Look at a version, and keep it open. Returns its number; None stands for the newest.

        Raises:
            ConfigError, DataError: it cannot be read.
        """
        reader: NeighborReader | ContextReader
        if self._config.data.neighbors == "contexts":
            reader = ContextReader(self._config, self._sources)
        else:
            reader = NeighborReader(self._config, self._sources, version)
        self._readers[reader.version] = reader
        self.identities[reader.version] = reader.identity()
        return reader.version

    def at(self, step: int) -> NeighborReader | ContextReader:
        """Reader of the version that a step reads.

        Raises:
            ConfigError, DataError: it cannot be read.
        """
        number = self.version_at(step)
        if number not in self._readers:
            self.open(number)
        for earlier in [other for other in list(self._readers) if other < number]:
            self._readers.pop(earlier, None)
        return self._readers[number]

    def version_at(self, step: int) -> int:
        """Number of the version that a step reads."""
        return next(change.version for change in reversed(self.changes) if change.first_step <= step)


def first_version(config: RunConfig, streams: Sequence[NeighborVersions]) -> int:
    """Number of the version that a run begins with: ``data.retro_version``, null for the newest; with ``newest`` the
    newest in which all of some streams have neighbors. It is open in all of them then.

    Raises:
        ConfigError, DataError: as for :class:`NeighborReader`; with ``newest``, of the newest version where there is
            none that all can read.
    """
    wanted, folder = config.data.retro_version, Path(config.data.retro_project or "")
    if not isinstance(wanted, str):
        return _open_in_all(streams, wanted)
    refused: list[tuple[int, GritError]] = []
    for number in reversed(version_numbers(folder)):
        try:
            _open_in_all(streams, number)
        except GritError as error:
            refused.append((number, error))
            continue
        for passed, reason in refused:
            log.info(f"version {passed} of {folder} is passed over: {reason}")
        return number
    if refused:
        raise refused[0][1]
    return _open_in_all(streams, None)  # which says that there is none


def _open_in_all(streams: Sequence[NeighborVersions], number: int | None) -> int:
    for versions in streams:
        number = versions.open(number)
    assert number is not None
    return number
