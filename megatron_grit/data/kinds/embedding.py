"""Queries with their passages, a batch from one source a step, to be embedded.

Shape suffix legend: T = tokens of a row, S = segments of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from megatron_grit.config.kinds import kind_batch_size
from megatron_grit.config.schema import RunConfig
from megatron_grit.config.schema.kinds.embedding import BATCH, DATA
from megatron_grit.data.indexed.roles import Role, RowKind, pooled, split_segments
from megatron_grit.data.order.blend import RecordOrder, blend_weights
from megatron_grit.data.order.sampler import EmbeddingSampler, Stream, passage_draws, pick_passages, stream_key
from megatron_grit.data.order.shared_texts import BoundRecords, find_bound_records
from megatron_grit.data.order.sources import OpenFiles, SourceRules, Sources
from megatron_grit.data.rows.batch import PackedRow
from megatron_grit.data.rows.row import start_row
from megatron_grit.data.rows.segments import Segment, too_long
from megatron_grit.data.rows.stream import PlannedRow, RowStream, cache_folder
from megatron_grit.data.text.markers import load_markers
from megatron_grit.data.text.tokenizer import Tokenizer
from megatron_grit.errors import ConfigError, DataError
from megatron_grit.store.cache import cached

LEAD_AND_TEXT = (Role.QUERY_INSTRUCTION, Role.QUERY)
"""Roles of the tokens of a segment that do not count for the loss, and of those that do, for the audit's rows."""
_CACHED_FROM_BYTES = 1 << 24
"""Size of a ``.bin`` from which its shared texts are kept in the index cache; a smaller one is read in no time."""
_POOLED = np.array([*(pooled(role) for role in Role), False], dtype=np.float32)


@dataclass(frozen=True, kw_only=True)
class EmbeddingCounts:
    """What the contrastive loss has to know of the global batch.

    The global list of texts is: queries 0..Q-1, then passages Q..Q+Q*G-1, where passages Q+i*G .. Q+i*G+G-1 belong
    to query i and the first of them is its positive.
    """

    num_queries: int
    """Q."""
    group_size: int
    """G: passages of a query."""
    slots_by_rank: list[Tensor]
    """For each data parallel rank the slots of its texts, in the order of its rows: int64."""
    source: str | None = None
    """Prefix of the source that the records come from."""
    num_labels: ClassVar[int] = 0
    """Supervised tokens."""

    @property
    def num_samples(self) -> int:
        """Queries."""
        return self.num_queries

    @property
    def num_segments(self) -> int:
        """Queries and passages."""
        return self.num_queries * (1 + self.group_size)


def source_rules(config: RunConfig, num_added: int = 0) -> SourceRules:
    """What a run asks of its sources of queries and passages.

    Args:
        config: the run.
        num_added: tokens of the markers that are put around a text.
    """
    return SourceRules(
        key=DATA,
        prefixes=config.data.embedding,
        records=RowKind.EMBEDDING,
        policy=config.data.over_long_texts,
        policy_key="data.over_long_texts",
        num_added=num_added,
        segments="texts",
        least_records=config.training.embedding_batch_size,
        batch_key=BATCH,
        group_size=config.data.train_group_size,
    )


class EmbeddingStream(RowStream):
    """Queries with their passages.

    Raises:
        ConfigError: a batch that the data does not allow, or markers that the vocabulary has no tokens for.
        DataError: see :class:`~megatron_grit.data.order.sources.Sources`.
    """

    kind = "embedding"
    reads_texts = False

    def __init__(
        self, config: RunConfig, tokenizer: Tokenizer, open_files: OpenFiles, num_rows_multiple: int = 1
    ) -> None:
        super().__init__(config, num_rows_multiple)
        self._config = config
        self._seed = config.training.seed
        self._policy = config.data.over_long_texts
        self._markers = load_markers(config.embedding, config.model.vocab_size, tokenizer)
        self.sources = Sources(config, tokenizer, self.rules(config, tokenizer), open_files)
        self.num_queries, self.group_size = kind_batch_size(config, self.kind), config.data.train_group_size
        entries = self.sources.entries
        key = stream_key(self._seed, Stream.EMBEDDING_RECORDS)
        order = RecordOrder(self.sources.sizes, [entry.cap for entry in entries], key)
        self._sampler = EmbeddingSampler(
            order,
            self.num_queries,
            self._seed,
            self.sources.names,
            weights=blend_weights(entries, order.sizes // self.num_queries),
            temperature=config.data.embedding_temperature,
            bound=None if config.data.allow_shared_texts else self._bound_records,
        )

    @classmethod
    def rules(cls, config: RunConfig, tokenizer: Tokenizer) -> SourceRules:
        """As in the base class."""
        if config.data.train_group_size < 1:
            raise ConfigError(f"data.train_group_size {config.data.train_group_size} is below 1")
        markers = load_markers(config.embedding, config.model.vocab_size, tokenizer)
        return source_rules(config, markers.query.num_tokens)

    def _bound_records(self, index: int) -> BoundRecords:
        if self.sources.meta(index).bin_bytes < _CACHED_FROM_BYTES:
            return find_bound_records(self.sources[index])
        key = {"what": "shared texts 1", "source": self.sources.identity([index])}
        arrays = cached(
            cache_folder(self._config), "shared_texts", key, lambda: vars(find_bound_records(self.sources[index]))
        )
        return BoundRecords(**arrays)

    def segments(self, step: int) -> list[Segment]:
        """The texts of a step: all queries, then the passages of the first query, and so on; see the base class."""
        index, records = self._sampler.batch(step)
        source = self.sources[index]
        draws = passage_draws(self._seed, step, self.num_queries, self.group_size)
        queries: list[Segment] = []
        passages: list[Segment] = []
        for slot, record in enumerate(records.tolist()):
            roles, lengths = source.spans(record)
            bounds = split_segments(roles)
            num_positives = roles.count(Role.POSITIVE)
            positive, negatives = pick_passages(draws[slot], num_positives, len(bounds) - 1 - num_positives)
            chosen = [0, 1 + positive, *(1 + num_positives + negative for negative in negatives)]
            texts = [self._text(index, record, roles, lengths, *bounds[number]) for number in chosen]
            queries.append(texts[0])
            passages += texts[1:]
        return queries + passages

    def _text(self, index: int, record: int, roles: list[int], lengths: list[int], first: int, last: int) -> Segment:
        start = sum(lengths[:first])
        roles, lengths = roles[first:last], lengths[first:last]
        markers = self._markers.query if roles[-1] == Role.QUERY else self._markers.passage
        length, limit = sum(lengths), self.sources.longest_segment - markers.num_tokens
        if length > limit:
            if self._policy == "stop":
                raise too_long(self.sources, index, record, length + markers.num_tokens)
            if length - lengths[-1] >= limit:
                name = self.sources[index].name(record)
                raise DataError(f"record {name} has an instruction that leaves no room for its text in {limit} tokens")
            lengths = [*lengths[:-1], lengths[-1] - (length - limit)]
            length = limit
        return Segment(
            sources=self.sources,
            source=index,
            record=record,
            start=start,
            stop=start + length,
            roles=roles,
            lengths=lengths,
            markers=markers,
        )

    def counts(self, rows: Sequence[PlannedRow], data_size: int) -> EmbeddingCounts:
        """As in the base class."""
        slots = [row.slots for row in rows]
        first = rows[0].segments[0]
        return EmbeddingCounts(
            num_queries=self.num_queries,
            group_size=self.group_size,
            slots_by_rank=[
                torch.from_numpy(np.concatenate([*slots[rank::data_size], np.empty(0, dtype=np.int64)]))
                for rank in range(data_size)
            ],
            source=first.sources.names[first.source],
        )

    def make_row(self, row: PlannedRow, row_length: int, pad_id: int) -> PackedRow:
        """As in the base class."""
        return make_row(row, row_length, pad_id)

    def source_counts(self, num_steps: int) -> dict[str, int]:
        """Queries of each source in the first steps."""
        return dict(zip(self.sources.names, self._sampler.counts(num_steps).tolist(), strict=True))


def make_row(planned: PlannedRow, row_length: int, pad_id: int) -> PackedRow:
    """A row of queries and passages.

    Args:
        planned: the segments of the row.
        row_length: T.
        pad_id: token of the padding.

    Raises:
        DataError: a damaged source.
    """
    texts = planned.segments
    roles_T, row = start_row(EmbeddingStream.kind, True, texts, row_length, pad_id)
    _put_markers(row, texts)
    sizes = np.diff(row.cu_seqlens.numpy())
    segment_ids_T = np.repeat(np.arange(len(sizes)), sizes)  # padding comes last: its number is S
    row.segment_ids_T = torch.from_numpy(segment_ids_T)
    row.pool_mask_T = torch.from_numpy(_POOLED[roles_T])
    row.slots_S = torch.from_numpy(planned.slots)
    row.is_query_S = torch.tensor([text.roles[-1] == Role.QUERY for text in texts])
    return row


def _put_markers(row: PackedRow, texts: Sequence[Segment]) -> None:
    """Around each text its markers, for which :func:`start_row` has left room at the end of the segment."""
    if not any(text.markers.num_tokens for text in texts):
        return
    tokens_T, mask_T = row.tokens_1T[0].numpy(), np.zeros(row.tokens_1T.shape[1], dtype=bool)
    end = 0
    for text in texts:
        opening, closing, end = text.markers.opening, text.markers.closing, end + text.length
        size = text.lengths[-1]
        begin = end - size - len(opening) - len(closing)
        ids = tokens_T[begin : begin + size].copy()
        tokens_T[begin:end] = [*opening, *ids, *closing]
        mask_T[begin:end] = True
        mask_T[begin + len(opening) : end - len(closing)] = False
    row.marker_mask_T = torch.from_numpy(mask_T)


STREAM = EmbeddingStream
