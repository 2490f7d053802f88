"""Packed rows of each step, for each data parallel rank.

Every rank samples the global batch and packs it by its lengths alone, so all ranks agree on the rows without a word;
each then reads the tokens of its own rows only (of all, where ends of turns have weights of their own). Row r goes to
data parallel rank r % data parallel size.
"""

from __future__ import annotations

import hashlib
import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_grit.config.kinds import load_kind, trained_kinds
from megatron_grit.config.schema import RunConfig
from megatron_grit.data.indexed.reader import IndexedMeta
from megatron_grit.data.order.sampler import noise_keys
from megatron_grit.data.order.sources import OpenFiles
from megatron_grit.data.rows.batch import BatchPart, PackedRow, StepBatch
from megatron_grit.data.rows.neighbor_versions import NeighborVersions, VersionChange, first_version
from megatron_grit.data.rows.stream import PlannedRow, RowStream
from megatron_grit.data.text.tokenizer import Tokenizer
from megatron_grit.errors import ConfigError

KINDS = "megatron_grit.data.kinds"
"""Folder with a file for each kind of row."""


class GritDataLoader:
    """Steps of a run. :meth:`batch` is a pure function of the step.

    Args:
        config: the run.
        tokenizer: the tokenizer that the indexed files were built with; its id pads rows.
        dp_rank: data parallel rank.
        dp_size: data parallel size.
        row_multiple: row lengths are rounded up to a multiple of this.
        equal_rows: pad every row of a step to the longest, as pipeline stages need it. Which segments share a row does
            not depend on this.

    Raises:
        ConfigError: a batch that the data or the mesh does not allow.
        DataError: an indexed file that is missing, damaged, of another tokenizer or of another kind.
    """

    def __init__(
        self,
        config: RunConfig,
        tokenizer: Tokenizer,
        dp_rank: int = 0,
        dp_size: int = 1,
        row_multiple: int = 8,
        equal_rows: bool = True,
    ) -> None:
        self._data = config.data
        self._noise_seed = config.training.seed if config.training.neftune_alpha else None
        self._pad_id = tokenizer.pad_id
        self._dp_rank, self._dp_size = dp_rank, dp_size
        self._row_multiple = row_multiple
        self._equal_rows = equal_rows
        self._lock = threading.Lock()  # files are closed and opened as they are needed
        self.streams = self._open(config, tokenizer)
        """The stream of each kind that the run trains."""
        if self.neighbors:
            self.read_versions([{"first_step": 0, "version": first_version(config, self.neighbors)}])

    def _open(self, config: RunConfig, tokenizer: Tokenizer) -> dict[str, RowStream]:
        multiple = config.data.num_rows_multiple or self._dp_size
        if multiple % self._dp_size:
            raise ConfigError(
                f"data.num_rows_multiple {multiple} is not a multiple of the data parallel size {self._dp_size}"
            )
        if config.training.seed < 0:
            raise ConfigError(f"training.seed {config.training.seed} is negative")
        open_files = OpenFiles()
        return {
            kind: load_kind(KINDS, kind).STREAM(config, tokenizer, open_files, multiple)
            for kind in trained_kinds(config)
        }

    @property
    def metas(self) -> dict[str, IndexedMeta]:
        """What the ``.json`` of each source says, by prefix."""
        every = [stream.sources for stream in self.streams.values()]
        return {name: sources.meta(number) for sources in every for number, name in enumerate(sources.names)}

    def batch(self, step: int) -> StepBatch:
        """Rows of ``step`` on this rank.

        Raises:
            DataError: a record that breaks its kind's grammar, or has no token to train on.
            ConfigError: fewer segments than rows, or no batch without shared texts.
        """
        with self._lock:
            return self._batch(step)

    def _batch(self, step: int) -> StepBatch:
        planned = {kind: stream.rows(step) for kind, stream in self.streams.items()}
        beside = {kind: stream.baseline_rows(step) for kind, stream in self.streams.items()}
        lengths = {kind: [self._padded(row, self.streams[kind]) for row in rows] for kind, rows in planned.items()}
        looked_at = {kind: [self._padded(row, self.streams[kind]) for row in rows] for kind, rows in beside.items()}
        row_length = max(length for every in [*lengths.values(), *looked_at.values()] for length in every)
        if self._equal_rows:
            lengths = {kind: [row_length] * len(rows) for kind, rows in planned.items()}
            looked_at = {kind: [row_length] * len(rows) for kind, rows in beside.items()}
        mine = slice(self._dp_rank, None, self._dp_size)
        parts = {
            kind: BatchPart(
                rows=self._make_rows(stream, planned[kind][mine], lengths[kind][mine], step),
                counts=stream.counts(planned[kind], self._dp_size),
                baseline=self._make_rows(stream, beside[kind][mine], looked_at[kind][mine], step),
            )
            for kind, stream in self.streams.items()
        }
        return StepBatch(
            step=step,
            parts=parts,
            row_length=row_length,
            num_tokens=sum(row.length for rows in planned.values() for row in rows),
            num_padded_tokens=sum(sum(every) for every in lengths.values()),
        )

    def _make_rows(
        self, stream: RowStream, rows: Sequence[PlannedRow], lengths: Sequence[int], step: int
    ) -> list[PackedRow]:
        made = [stream.make_row(row, length, self._pad_id) for row, length in zip(rows, lengths, strict=True)]
        full = [number for number, row in enumerate(rows) if row.segments]
        if stream.neighbors is not None and full:
            found = stream.neighbors.at(step).read([rows[number].segments for number in full])
            for number, neighbors in zip(full, found, strict=True):
                made[number].neighbors = neighbors
        if self._noise_seed is not None:
            for planned, row in zip(rows, made, strict=True):
                if not row.embeds:
                    row.noise_keys = noise_keys(self._noise_seed, step, planned.slots)
        return made

    def _padded(self, row: PlannedRow, stream: RowStream) -> int:
        return -(-max(stream.fixed_length or row.length, 1) // self._row_multiple) * self._row_multiple

    def fingerprint(self, step: int) -> str:
        """Which records ``step`` is made of, where they are cut, which neighbors are read: the same at every layout.

        Folders do not count, so that a run can resume after its data was moved.

        Raises:
            DataError, ConfigError: as :meth:`batch`.
        """
        with self._lock:
            segments = [segment for stream in self.streams.values() for segment in stream.segments(step)]
            beside = [versions.at(step).identity() for versions in self.neighbors]
        digest = hashlib.sha256("".join(beside).encode())
        for segment in segments:
            digest.update(f"{Path(segment.name).name}:{segment.start}:{segment.stop}\n".encode())
        return digest.hexdigest()

    @property
    def neighbors(self) -> list[NeighborVersions]:
        """What the rows of each stream read from ``data.retro_project``, of those that read."""
        return [stream.neighbors for stream in self.streams.values() if stream.neighbors is not None]

    def versions_read(self) -> list[dict[str, Any]]:
        """Which version of ``data.retro_project`` is read from which step on, for a checkpoint and
        :meth:`read_versions`: ``first_step`` from 0, ``version``, and ``identity`` of its chunks and neighbors,
        "" for one that was not opened. An empty list where rows have no neighbors."""
        every = self.neighbors
        return [
            {
                "first_step": change.first_step,
                "version": change.version,
                "identity": self._identity(change.version),
            }
            for change in (every[0].changes if every else ())
        ]

    def _identity(self, number: int) -> str:
        """Of a version, in all streams; "" where one has not opened it."""
        found = [versions.identities.get(number, "") for versions in self.neighbors]
        return ":".join(found) if all(found) else ""

    def read_versions(self, record: Sequence[Mapping[str, Any]]) -> None:
        """Read the versions that :meth:`versions_read` told, perhaps of another run."""
        changes = [VersionChange(first_step=int(each["first_step"]), version=int(each["version"])) for each in record]
        with self._lock:
            for versions in self.neighbors:
                versions.changes = list(changes)

    def open_version(self, number: int) -> str:
        """Open a version of the database for a later step. Returns its identity.

        Raises:
            ConfigError, DataError: a source has no neighbors in it, or it cannot be read.
        """
        for versions in self.neighbors:
            versions.open(number)
        return self._identity(number)

    @property
    def num_ahead(self) -> int:
        """Steps whose rows may be made before one is trained: in the queue, and one that waits to be put there."""
        ahead = self._data.prefetch_steps
        return ahead + 1 if ahead else 0

    def change_version(self, number: int, num_trained: int) -> int:
        """Read another version as soon as no rank has made rows of the step. Returns the first such step, from 0.

        Args:
            number: the version.
            num_trained: steps that were trained; the same on all ranks.
        """
        first = num_trained + self.num_ahead
        with self._lock:
            for versions in self.neighbors:
                kept = [change for change in versions.changes if change.first_step < first]
                versions.changes = [*kept, VersionChange(first_step=first, version=number)]
        return first

    def source_counts(self, num_steps: int) -> dict[str, dict[str, int]]:
        """Samples that each source gives to the first steps, by kind and prefix."""
        with self._lock:
            return {kind: stream.source_counts(num_steps) for kind, stream in self.streams.items()}

    def iterate(self, start_step: int, end_step: int) -> Iterator[StepBatch]:
        """Steps ``start_step`` to ``end_step - 1``, packed ahead in a thread. Close the iterator to stop the thread.

        Raises:
            GritError: whatever :meth:`batch` raises, at the step that it belongs to.
        """
        if not self._data.prefetch_steps:
            yield from (self.batch(step) for step in range(start_step, end_step))
            return
        ready: queue.Queue[StepBatch | BaseException] = queue.Queue(maxsize=self._data.prefetch_steps)
        stopped = threading.Event()

        def put(item: StepBatch | BaseException) -> None:
            while not stopped.is_set():
                try:
                    return ready.put(item, timeout=0.1)
                except queue.Full:
                    continue

        def work() -> None:
            for step in range(start_step, end_step):
                if stopped.is_set():
                    return
                try:
                    put(self.batch(step))
                except BaseException as error:  # raised again in the thread that asks for this step
                    return put(error)

        thread = threading.Thread(target=work, name="grit-data-prefetch", daemon=True)
        thread.start()
        try:
            for _ in range(start_step, end_step):
                item = ready.get()
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stopped.set()
            thread.join()
