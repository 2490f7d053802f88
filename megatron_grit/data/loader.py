"""Packed rows of each step, for each data parallel rank.

Every rank samples the global batch and packs it by its lengths alone, so all ranks agree on the rows without a word;
each then reads the tokens of its own rows only. Row r goes to data parallel rank r % data parallel size.

Shape suffix legend: T = tokens of a row, S = segments of a row.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from megatron_grit.config.schema import RunConfig
from megatron_grit.data.batch import PackedRow, RowKind, StepBatch
from megatron_grit.data.indexed import IndexedRecords, num_labels
from megatron_grit.data.packing import pack
from megatron_grit.data.roles import Role, pooled, split_segments, supervised
from megatron_grit.data.sampler import EmbeddingSampler, GenerativeSampler, passage_draws, pick_passages
from megatron_grit.data.tokenizer import Tokenizer
from megatron_grit.errors import ConfigError, DataError

_Item = TypeVar("_Item")


@dataclass(frozen=True, kw_only=True)
class Segment:
    """What attends to itself: a query or passage with its instruction, a text, or a conversation."""

    source: IndexedRecords
    record: int
    start: int
    """First span of the record that belongs to it."""
    stop: int
    length: int
    """Tokens."""
    num_labels: int = 0
    """Tokens that the next-token loss counts."""


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
        self._seed = config.training.seed
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
        if self._seed < 0:
            raise ConfigError(f"training.seed {self._seed} is negative")
        objective = config.training.objective
        self._embedding_sources: list[IndexedRecords] = []
        self._generative_sources: list[IndexedRecords] = []
        self._num_queries = self._num_sequences = 0
        if objective in ("embedding", "unified"):
            self._embedding_sources = self._open(config, tokenizer, RowKind.EMBEDDING)
            self._check_negatives()
            self._num_queries = config.training.embedding_batch_size
            self._embedding_sampler = EmbeddingSampler(
                [len(source) for source in self._embedding_sources],
                self._num_queries,
                self._seed,
                [source.prefix for source in self._embedding_sources],
            )
        if objective in ("generative", "unified"):
            self._generative_sources = self._open(config, tokenizer, RowKind.GENERATIVE)
            self._num_sequences = config.training.generative_batch_size
            sizes = [len(source) for source in self._generative_sources]
            self._generative_sampler = GenerativeSampler(sizes, self._num_sequences, self._seed)

    def _open(self, config: RunConfig, tokenizer: Tokenizer, kind: RowKind) -> list[IndexedRecords]:
        prefixes = getattr(config.data, kind.value)
        if not prefixes:
            raise ConfigError(
                f"data.{kind.value} is empty, but training.objective {config.training.objective} needs it"
            )
        sources = [IndexedRecords(prefix) for prefix in prefixes]
        for source in sources:
            meta, path = source.meta, f"{source.prefix}.json"
            if source.kind is not kind:
                raise DataError(f"holds {meta.kind} records and stands under data.{kind.value}", path=path)
            if meta.tokenizer_fingerprint != tokenizer.fingerprint:
                raise DataError(
                    f"was built with another tokenizer than {tokenizer.path}; build it again or set data.tokenizer",
                    path=path,
                )
            for limit, knob in (
                (config.data.tokens_per_row, "data.tokens_per_row"),
                (config.model.max_position_embeddings, "model.max_position_embeddings"),
            ):
                if meta.longest_segment_tokens > limit:
                    raise DataError(
                        f"record {source.name(meta.longest_segment_record)} has a segment of "
                        f"{meta.longest_segment_tokens} tokens, more than {knob} {limit}; raise it, or build the file "
                        "again with a lower limit",
                        path=path,
                    )
        return sources

    def _check_negatives(self) -> None:
        wanted = self._data.train_group_size - 1
        if wanted < 0:
            raise ConfigError(f"data.train_group_size {wanted + 1} is below 1")
        for source in self._embedding_sources:
            if wanted and source.meta.min_negatives == 0:
                raise ConfigError(
                    f"data.train_group_size {wanted + 1} needs negatives, and {source.prefix} has records without any; "
                    "set data.train_group_size to 1, or add negatives to every record"
                )

    def batch(self, step: int) -> StepBatch:
        """Rows of ``step`` on this rank.

        Raises:
            DataError: a record that breaks its kind's grammar, or has no token to train on.
            ConfigError: fewer segments than rows.
        """
        source_name, texts = self._sample_texts(step) if self._num_queries else (None, [])
        sequences = self._sample_sequences(step) if self._num_sequences else []
        embedding = self._pack(texts, RowKind.EMBEDDING)
        generative = self._pack(sequences, RowKind.GENERATIVE)
        used = [sum(texts[i].length for i in row) for row in embedding]
        used += [sum(sequences[i].length for i in row) for row in generative]
        padded = [-(-length // self._row_multiple) * self._row_multiple for length in used]
        row_length = max(padded)
        if self._equal_rows:
            padded = [row_length] * len(used)
        embedding_lengths, generative_lengths = padded[: len(embedding)], padded[len(embedding) :]
        return StepBatch(
            step=step,
            embedding_rows=[
                self._embedding_row(texts, row, length)
                for row, length in zip(self._mine(embedding), self._mine(embedding_lengths), strict=True)
            ],
            generative_rows=[
                self._generative_row(sequences, row, length)
                for row, length in zip(self._mine(generative), self._mine(generative_lengths), strict=True)
            ],
            row_length=row_length,
            num_queries=self._num_queries,
            group_size=self._data.train_group_size,
            slots_by_rank=[
                torch.from_numpy(np.concatenate([*embedding[rank :: self._dp_size], np.empty(0, dtype=np.int64)]))
                for rank in range(self._dp_size)
            ],
            num_loss_tokens=sum(segment.num_labels for segment in sequences),
            num_sequences=self._num_sequences,
            num_generative_rows=len(generative),
            num_tokens=sum(used),
            num_padded_tokens=sum(padded),
            embedding_source=source_name,
        )

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

    def _sample_texts(self, step: int) -> tuple[str, list[Segment]]:
        """The source of a step, and its texts: all queries, then the passages of the first query, and so on."""
        source_index, records = self._embedding_sampler.batch(step)
        source = self._embedding_sources[source_index]
        draws = passage_draws(self._seed, step, self._num_queries, self._data.train_group_size)
        queries: list[Segment] = []
        passages: list[Segment] = []
        for slot, record in enumerate(records.tolist()):
            roles, lengths = source.spans(record)
            segments = [
                Segment(source=source, record=record, start=start, stop=stop, length=sum(lengths[start:stop]))
                for start, stop in split_segments(roles)
            ]
            num_positives = roles.count(Role.POSITIVE)
            positive, negatives = pick_passages(draws[slot], num_positives, len(segments) - 1 - num_positives)
            queries.append(segments[0])
            passages.append(segments[1 + positive])
            passages += [segments[1 + num_positives + negative] for negative in negatives]
        return source.prefix, queries + passages

    def _sample_sequences(self, step: int) -> list[Segment]:
        sequences = []
        for source_index, record in self._generative_sampler.batch(step):
            source = self._generative_sources[source_index]
            roles, lengths = source.spans(record)
            labels = num_labels(roles, lengths)
            if labels < 1:
                raise DataError(f"record {source.name(record)} has no token to predict; build the file again")
            sequences.append(
                Segment(source=source, record=record, start=0, stop=len(roles), length=sum(lengths), num_labels=labels)
            )
        return sequences

    def _pack(self, segments: Sequence[Segment], kind: RowKind) -> list[np.ndarray]:
        longest = max(segments, key=lambda segment: segment.length, default=None)
        if longest is not None and longest.length > self._data.tokens_per_row:
            raise DataError(
                f"record {longest.source.name(longest.record)} has a segment of {longest.length} tokens, more than "
                f"data.tokens_per_row {self._data.tokens_per_row}"
            )
        lengths = np.array([segment.length for segment in segments], dtype=np.int64)
        try:
            return pack(lengths, self._data.tokens_per_row, self._num_rows_multiple)
        except ConfigError as error:
            raise ConfigError(f"{kind.value} batch: {error}") from None

    def _embedding_row(self, texts: Sequence[Segment], slots: np.ndarray, row_length: int) -> PackedRow:
        segments = [texts[slot] for slot in slots]
        roles_T, row = self._row(RowKind.EMBEDDING, segments, row_length)
        lengths = np.array([segment.length for segment in segments])
        segment_ids_T = np.full(row_length, len(segments), dtype=np.int64)
        segment_ids_T[: lengths.sum()] = np.repeat(np.arange(len(segments)), lengths)
        row.segment_ids_T = torch.from_numpy(segment_ids_T)
        row.pool_mask_T = torch.from_numpy(_POOLED[roles_T])
        row.slots_S = torch.from_numpy(slots)
        return row

    def _generative_row(self, sequences: Sequence[Segment], indices: np.ndarray, row_length: int) -> PackedRow:
        roles_T, row = self._row(RowKind.GENERATIVE, [sequences[index] for index in indices], row_length)
        # Position t predicts token t + 1 of its own segment, if that one has a supervised role.
        follows = (row.positions_1T[0, 1:] > 0) & ~row.padding_mask_1T[0, 1:]
        mask = torch.zeros(1, row_length, dtype=torch.float32)
        mask[0, :-1] = torch.from_numpy(_SUPERVISED[roles_T[1:]]) * follows
        labels = torch.zeros(1, row_length, dtype=torch.int64)
        labels[0, :-1] = row.tokens_1T[0, 1:] * follows
        row.labels_1T, row.loss_mask_1T = labels, mask
        return row

    def _row(self, kind: RowKind, segments: Sequence[Segment], row_length: int) -> tuple[np.ndarray, PackedRow]:
        """Role of each token of a row (int8 [T], _PADDING_ROLE on padding), and the row without its masks."""
        tokens_T = np.full(row_length, self._pad_id, dtype=np.int64)
        roles_T = np.full(row_length, _PADDING_ROLE, dtype=np.int8)
        positions_T = np.empty(row_length, dtype=np.int64)
        ends = [0]
        for segment in segments:
            for role, ids in segment.source.get(segment.record)[segment.start : segment.stop]:
                place = slice(ends[-1], ends[-1] + len(ids))
                tokens_T[place], roles_T[place] = ids, role
                ends.append(place.stop)
            del ends[-(segment.stop - segment.start) : -1]  # ends of segments, not of spans
        num_tokens = ends[-1]
        if num_tokens < row_length:
            ends.append(row_length)
        for start, stop in zip(ends[:-1], ends[1:], strict=True):
            positions_T[start:stop] = np.arange(stop - start)
        return roles_T, PackedRow(
            kind=kind,
            tokens_1T=torch.from_numpy(tokens_T)[None],
            positions_1T=torch.from_numpy(positions_T)[None],
            cu_seqlens=torch.tensor(ends, dtype=torch.int32),
            max_seqlen=int(np.diff(ends).max()),
            padding_mask_1T=_padding_mask(num_tokens, row_length),
            record_ids=[segment.source.name(segment.record) for segment in segments],
        )


_PADDING_ROLE = len(Role)
_SUPERVISED = np.array([*(supervised(role) for role in Role), False], dtype=np.float32)
_POOLED = np.array([*(pooled(role) for role in Role), False], dtype=np.float32)


def _padding_mask(num_tokens: int, row_length: int) -> Tensor:
    return (torch.arange(row_length) >= num_tokens)[None]
