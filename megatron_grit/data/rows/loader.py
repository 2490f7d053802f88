"""Packed rows of each step, for each data parallel rank.

Every rank samples the global batch and packs it by its lengths alone, so all ranks agree on the rows without a word;
each then reads the tokens of its own rows only. Row r goes to data parallel rank r % data parallel size.
"""

from __future__ import annotations

import hashlib
import queue
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from megatron_grit.config.schema import RunConfig
from megatron_grit.data.indexed.roles import RowKind
from megatron_grit.data.kinds.streams import EmbeddingStream, GenerativeStream
from megatron_grit.data.order.sources import OpenFiles
from megatron_grit.data.rows.batch import StepBatch
from megatron_grit.data.rows.packing import pack
from megatron_grit.data.rows.row import embedding_row, generative_row
from megatron_grit.data.rows.segments import Segment
from megatron_grit.data.text.tokenizer import Tokenizer
from megatron_grit.errors import ConfigError

_Item = TypeVar("_Item")


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
        self._pad_id = tokenizer.pad_id
        self._dp_rank, self._dp_size = dp_rank, dp_size
        self._row_multiple = row_multiple
        self._equal_rows = equal_rows
        self._num_rows_multiple = config.data.num_rows_multiple or dp_size
        if self._num_rows_multiple % dp_size:
            raise ConfigError(
                f"data.num_rows_multiple {self._num_rows_multiple} is not a multiple of the data parallel size "
                f"{dp_size}"
            )
        if config.training.seed < 0:
            raise ConfigError(f"training.seed {config.training.seed} is negative")
        self._fixed_rows = config.data.packing == "window"
        if self._fixed_rows and (config.training.generative_rows or 0) % self._num_rows_multiple:
            raise ConfigError(
                f"training.generative_rows {config.training.generative_rows} is not a multiple of "
                f"{self._num_rows_multiple}, the data parallel size or data.num_rows_multiple"
            )
        self._lock = threading.Lock()  # files are closed and opened as they are needed
        open_files = OpenFiles()
        self._embedding: EmbeddingStream | None = None
        self._generative: GenerativeStream | None = None
        if config.training.objective != "generative":
            self._embedding = EmbeddingStream(config, tokenizer, open_files)
        if config.training.objective != "embedding":
            self._generative = GenerativeStream(config, tokenizer, open_files)

    def batch(self, step: int) -> StepBatch:
        """Rows of ``step`` on this rank.

        Raises:
            DataError: a record that breaks its kind's grammar, or has no token to train on.
            ConfigError: fewer segments than rows, or no batch without shared texts.
        """
        with self._lock:
            return self._batch(step)

    def _batch(self, step: int) -> StepBatch:
        source_name, texts = self._embedding.texts(step) if self._embedding else (None, [])
        slots = self._pack(texts, RowKind.EMBEDDING)
        embedding = [[texts[slot] for slot in row] for row in slots]
        generative = self._generative_rows(step)
        used = [sum(segment.length for segment in row) for row in embedding + generative]
        padded = [-(-length // self._row_multiple) * self._row_multiple for length in used]
        if self._fixed_rows:
            length = -(-self._data.tokens_per_row // self._row_multiple) * self._row_multiple
            padded[len(embedding) :] = [length] * len(generative)
        row_length = max(padded)
        if self._equal_rows:
            padded = [row_length] * len(used)
        embedding_lengths, generative_lengths = padded[: len(embedding)], padded[len(embedding) :]
        return StepBatch(
            step=step,
            embedding_rows=[
                embedding_row(row, places, length, self._pad_id)
                for row, places, length in zip(
                    self._mine(embedding), self._mine(slots), self._mine(embedding_lengths), strict=True
                )
            ],
            generative_rows=[
                generative_row(row, length, self._pad_id)
                for row, length in zip(self._mine(generative), self._mine(generative_lengths), strict=True)
            ],
            row_length=row_length,
            num_queries=self._embedding.num_queries if self._embedding else 0,
            group_size=self._data.train_group_size,
            slots_by_rank=[
                torch.from_numpy(np.concatenate([*slots[rank :: self._dp_size], np.empty(0, dtype=np.int64)]))
                for rank in range(self._dp_size)
            ],
            num_loss_tokens=sum(segment.num_labels for row in generative for segment in row),
            num_sequences=sum(len(row) for row in generative),
            num_generative_rows=len(generative),
            num_tokens=sum(used),
            num_padded_tokens=sum(padded),
            embedding_source=source_name,
        )

    def fingerprint(self, step: int) -> str:
        """Which records ``step`` is made of, and where they are cut: the same on every rank and at every layout.

        Folders do not count, so that a run may go on where its data was moved.

        Raises:
            DataError, ConfigError: as :meth:`batch`.
        """
        with self._lock:
            segments = list(self._embedding.texts(step)[1]) if self._embedding else []
            if self._generative is not None and self._fixed_rows:
                segments += [segment for row in self._generative.rows(step) for segment in row]
            elif self._generative is not None:
                segments += self._generative.sequences(step)
        digest = hashlib.sha256()
        for segment in segments:
            digest.update(f"{Path(segment.name).name}:{segment.start}:{segment.stop}\n".encode())
        return digest.hexdigest()

    def source_counts(self, num_steps: int) -> dict[str, dict[str, int]]:
        """Queries and generative sequences that each source gives to the first steps, by kind and prefix."""
        with self._lock:
            streams = {RowKind.EMBEDDING: self._embedding, RowKind.GENERATIVE: self._generative}
            return {kind.value: stream.counts(num_steps) for kind, stream in streams.items() if stream is not None}

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

    def _mine(self, rows: Sequence[_Item]) -> Sequence[_Item]:
        return rows[self._dp_rank :: self._dp_size]

    def _generative_rows(self, step: int) -> list[list[Segment]]:
        if self._generative is None:
            return []
        if self._fixed_rows:
            return self._generative.rows(step)
        sequences = self._generative.sequences(step)
        return [[sequences[index] for index in row] for row in self._pack(sequences, RowKind.GENERATIVE)]

    def _pack(self, segments: Sequence[Segment], kind: RowKind) -> list[np.ndarray]:
        lengths = np.array([segment.length for segment in segments], dtype=np.int64)
        try:
            return pack(lengths, self._data.tokens_per_row, self._num_rows_multiple)
        except ConfigError as error:
            raise ConfigError(f"{kind.value} batch: {error}") from None
