"""Texts and conversations, whose next tokens are predicted: a number of sequences a step, or a number of full rows.

Shape suffix legend: T = tokens of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from megatron_grit.config.kinds import kind_batch_size, kind_options, kind_sources
from megatron_grit.config.schema import RunConfig
from megatron_grit.config.shape import reads_neighbors
from megatron_grit.data.indexed.label_weights import ANSWERS, LabelWeights
from megatron_grit.data.indexed.roles import Role, RowKind
from megatron_grit.data.indexed.top_probabilities import TopProbabilities, open_caches
from megatron_grit.data.order.blend import RecordOrder, blend_weights
from megatron_grit.data.order.sampler import GenerativeSampler, Stream, stream_key
from megatron_grit.data.order.sources import OpenFiles, SourceRules, Sources, longest_segment
from megatron_grit.data.rows.batch import PackedRow
from megatron_grit.data.rows.neighbor_versions import NeighborVersions
from megatron_grit.data.rows.row import start_row
from megatron_grit.data.rows.row_plan import PIECE, RowPlan
from megatron_grit.data.rows.segments import OverLong, Segment, ranges, spans_between, too_long
from megatron_grit.data.rows.stream import PlannedRow, RowStream, cache_folder
from megatron_grit.data.text.tokenizer import Tokenizer
from megatron_grit.errors import ConfigError, DataError

LEAD_AND_TEXT = (Role.USER, Role.ANSWER)


@dataclass(frozen=True, kw_only=True)
class GenerativeCounts:
    """What the next-token loss is divided by, counted over the global batch."""

    num_labels: int
    """Tokens that are labels."""
    num_loss_tokens: float
    """The same, each counted by its weight."""
    num_sequences: int
    """Segments."""
    num_rows: int
    """Rows."""
    group_sizes_S: np.ndarray = field(compare=False)
    """float32 [num_sequences]: labels, by weight, of the group of consecutive segments that each belongs to."""
    num_groups: int
    """Such groups."""

    @property
    def num_samples(self) -> int:
        """Sequences; of one that is cut, each piece."""
        return self.num_sequences

    @property
    def num_segments(self) -> int:
        """Segments."""
        return self.num_sequences


def source_rules(config: RunConfig, kind: str = "generative") -> SourceRules:
    """What a run asks of its sources of texts and conversations.

    Args:
        config: the run.
        kind: name of the kind whose sources they are.
    """
    return SourceRules(
        key=kind_options(kind).DATA,
        prefixes=kind_sources(config, kind),
        records=RowKind.GENERATIVE,
        policy=config.data.over_long,
        policy_key="data.over_long",
    )


class GenerativeStream(RowStream):
    """Texts and conversations: a number of sequences a step, or a number of full rows.

    A kind with rows of the same make is a subclass with a name of its own.

    Raises:
        ConfigError, DataError: as for :class:`EmbeddingStream`.
    """

    kind = "generative"
    record_draws: int = Stream.GENERATIVE_RECORDS
    """Number of the random stream that orders the records; see :func:`~megatron_grit.data.order.sampler.stream_of`."""
    rows_key = "training.generative_rows"
    """The configuration's key of the full rows of a step."""

    def __init__(
        self, config: RunConfig, tokenizer: Tokenizer, open_files: OpenFiles, num_rows_multiple: int = 1
    ) -> None:
        super().__init__(config, num_rows_multiple)
        self._policy, self._multiple = self.over_long(config), config.data.split_multiple
        self._weights = self.labels(config, tokenizer)
        self._group = config.loss.microbatch_sequences
        self._num_sequences, self._num_rows = kind_batch_size(config, self.kind), self.full_rows(config)
        if self._num_rows is not None and self._num_rows % num_rows_multiple:
            raise ConfigError(
                f"{self.rows_key} {self._num_rows} is not a multiple of {num_rows_multiple}, the data "
                "parallel size or data.num_rows_multiple"
            )
        self.sources = Sources(config, tokenizer, self.rules(config, tokenizer), open_files)
        self._teachers: list[TopProbabilities] = []
        self.open_beside(config, tokenizer)
        entries, seed = self.sources.entries, config.training.seed
        order = RecordOrder(self.sources.sizes, [entry.cap for entry in entries], stream_key(seed, self.record_draws))
        weights = blend_weights(entries, order.sizes)
        self._sampler = GenerativeSampler(order, weights)
        self._plan: RowPlan | None = None
        if self._num_rows is not None:
            self.fixed_length = config.data.tokens_per_row
            identity = {
                "sources": self.sources.identity(),
                "weights": weights.tolist(),
                "sizes": order.sizes.tolist(),
                "seed": seed,
                "longest_segment": self.sources.longest_segment,
                "over_long": self._policy,
            }
            if self._multiple > 1:
                identity["split_multiple"] = self._multiple
            if self._weights.identity():
                identity["labels"] = self._weights.identity()
            self._plan = RowPlan(
                self._pieces,
                config.data.tokens_per_row,
                config.data.packing_window,
                stream_key(seed, Stream.ROWS),
                cache_folder(config),
                identity,
            )

    def open_beside(self, config: RunConfig, tokenizer: Tokenizer) -> None:
        """Open what is read beside the records: what a teacher says of them, and their neighbors."""
        knobs = config.loss.teacher
        if knobs.kind == "topk":
            assert knobs.cache is not None
            files = [self.sources[number] for number in range(len(self.sources))]
            vocab_size = config.model.vocab_size or tokenizer.vocab_size
            self._teachers = open_caches(knobs.cache, knobs.temperature, vocab_size, files)
        if reads_neighbors(config.model):
            self.neighbors = NeighborVersions(config, self.sources)

    @staticmethod
    def over_long(config: RunConfig) -> OverLong:
        """What becomes of a record that is too long."""
        return config.data.over_long

    @classmethod
    def rules(cls, config: RunConfig, tokenizer: Tokenizer) -> SourceRules:
        """As in the base class."""
        multiple = config.data.split_multiple
        if config.data.over_long == "split" and multiple >= longest_segment(config):
            raise ConfigError(
                f"data.split_multiple {multiple} needs rows of {multiple + 1} tokens at least; raise "
                "data.tokens_per_row or model.max_position_embeddings"
            )
        return source_rules(config, cls.kind)

    @staticmethod
    def full_rows(config: RunConfig) -> int | None:
        """As in the base class."""
        if config.data.packing == "step":
            return None
        if config.training.generative_rows is None:
            raise ConfigError("data.packing window needs training.generative_rows: the generative rows of a step")
        return config.training.generative_rows

    def segments(self, step: int) -> list[Segment]:
        """The sequences of a step, or the pieces of its full rows; see the base class."""
        if self._plan is not None:
            return [segment for row in self.rows(step) for segment in row.segments]
        return self._sequences(step)

    def rows(self, step: int) -> list[PlannedRow]:
        """As in the base class."""
        if self._plan is None:
            return super().rows(step)
        assert self._num_rows is not None
        planned = self._plan.rows(step * self._num_rows, (step + 1) * self._num_rows)
        made = [[segment for piece in row.tolist() for segment in self._piece(piece)] for row in planned]
        ends = np.cumsum([len(segments) for segments in made])
        return [
            PlannedRow(segments=segments, slots=np.arange(end - len(segments), end))
            for segments, end in zip(made, ends.tolist(), strict=True)
        ]

    def counts(self, rows: Sequence[PlannedRow], data_size: int) -> GenerativeCounts:
        """As in the base class."""
        weights_S = np.zeros(sum(len(row.segments) for row in rows))
        for row in rows:
            weights_S[row.slots] = [segment.label_weight for segment in row.segments]
        num_labels = sum(segment.num_labels for row in rows for segment in row.segments)
        return count_labels(weights_S, num_labels, len(rows), self._group)

    def make_row(self, row: PlannedRow, row_length: int, pad_id: int) -> PackedRow:
        """As in the base class."""
        made = make_row(row, row_length, pad_id, self._weights, self.kind)
        if self._teachers:
            add_teacher(made, row, self._teachers)
        return made

    def _slots(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Source and record of each slot of the stream: int64 each."""
        sources, places = self._sampler.slots(start, stop)
        return sources, self.sources.trained_records(sources, places)

    def _sequences(self, step: int) -> list[Segment]:
        start = step * self._num_sequences
        sources, records = self._slots(start, start + self._num_sequences)
        segments = []
        for source, record in zip(sources.tolist(), records.tolist(), strict=True):
            segments += self.segments_of(source, record)
        if not segments:
            raise DataError(
                f"step {step}: all of its {self._num_sequences} sequences are too long, and data.over_long is "
                f"{self._policy}; raise data.tokens_per_row"
            )
        return segments

    def segments_of(self, source: int, record: int) -> list[Segment]:
        """As in the base class."""
        roles, lengths = self._spans(source, record)
        found = [
            self._segment(source, record, roles, lengths, begin, end)
            for begin, end in self._ranges(source, record, roles, lengths)
        ]
        if sum(lengths) <= self.sources.longest_segment and not found[-1].num_labels:
            raise self._nothing(source, record)
        return found

    def _piece(self, piece: tuple[int, int, int, int, int]) -> list[Segment]:
        source, record, start, stop, _ = piece
        roles, lengths = self._spans(source, record)
        if stop > sum(lengths):
            name = self.sources[source].name(record)
            raise DataError(f"record {name} has {sum(lengths)} tokens, not the {stop} that were planned with")
        segment = self._segment(source, record, roles, lengths, start, stop)
        if not segment.num_labels:
            raise self._nothing(source, record)
        return [segment]

    def _spans(self, source: int, record: int) -> tuple[list[int], list[int]]:
        return self.sources[source].spans(record)

    def _nothing(self, source: int, record: int) -> DataError:
        remedy = "build the file again"
        if self._weights != ANSWERS:
            remedy = "loss.labels or loss.role_weights leave out the roles, or ends of turns, that it has"
        return DataError(f"record {self.sources[source].name(record)} has no token to predict; {remedy}")

    def _ranges(self, source: int, record: int, roles: list[int], lengths: list[int]) -> list[tuple[int, int]]:
        """What becomes of a record: pieces of one that is too long only where they have something to train on."""
        length, limit = sum(lengths), self.sources.longest_segment
        found = ranges(length, limit, self._policy, self._multiple)
        if length <= limit:
            return found
        if self._policy == "stop":
            raise too_long(self.sources, source, record, length)
        made = [self._segment(source, record, roles, lengths, start, stop) for start, stop in found]
        return [(segment.start, segment.stop) for segment in made if segment.num_labels]

    def _segment(
        self, source: int, record: int, roles: list[int], lengths: list[int], start: int, stop: int
    ) -> Segment:
        if stop - start < sum(lengths):
            roles, lengths = spans_between(roles, lengths, start, stop)
        if self._weights.needs_tokens:
            tokens_T = self.sources[source].tokens(record, start, stop - start)
            weights_T = self._weights.of_tokens(roles, lengths, not start, tokens_T)
            num_labels, label_weight = int(np.count_nonzero(weights_T)), float(weights_T.sum(dtype=np.float64))
        else:
            num_labels, label_weight = self._weights.total(roles, lengths, not start)
        return Segment(
            sources=self.sources,
            source=source,
            record=record,
            start=start,
            stop=stop,
            roles=roles,
            lengths=lengths,
            num_labels=num_labels,
            label_weight=label_weight,
        )

    def _pieces(self, start: int, stop: int) -> np.ndarray:
        """The pieces of some slots, in their order: PIECE."""
        sources, records = self._slots(start, stop)
        lengths = np.empty(len(records), dtype=np.int64)
        for source in np.unique(sources).tolist():
            chosen = sources == source
            lengths[chosen] = self.sources.record_lengths(source, records[chosen])
        pieces = np.zeros(len(records), dtype=PIECE)
        pieces["source"], pieces["record"], pieces["stop"] = sources, records, lengths
        parts, done = [], 0
        for slot in np.flatnonzero(lengths > self.sources.longest_segment).tolist():  # shorter ones are never cut
            source, record = int(sources[slot]), int(records[slot])
            found = self._ranges(source, record, *self._spans(source, record))
            parts.append(pieces[done:slot])
            parts.append(np.array([(source, record, begin, end, 0) for begin, end in found], dtype=PIECE))
            done = slot + 1
        return np.concatenate([*parts, pieces[done:]])

    def source_counts(self, num_steps: int) -> dict[str, int]:
        """Sequences of each source in the first steps; of records that are cut, each piece."""
        if self._plan is None:
            counts = self._sampler.counts(num_steps * self._num_sequences)
        else:
            assert self._num_rows is not None
            counts = self._plan.counts(num_steps * self._num_rows, len(self.sources))
        return dict(zip(self.sources.names, counts.tolist(), strict=True))


def count_labels(
    weights_S: np.ndarray, num_labels: int, num_rows: int, microbatch_sequences: int = 1
) -> GenerativeCounts:
    """What the losses of a step are divided by.

    Args:
        weights_S: float64 [S], sum of the weights of the labels of each segment of the global batch.
        num_labels: of the global batch.
        num_rows: of the global batch.
        microbatch_sequences: ``loss.microbatch_sequences``.
    """
    groups_S = np.arange(len(weights_S)) // microbatch_sequences
    return GenerativeCounts(
        num_labels=num_labels,
        num_loss_tokens=weights_S.sum().item(),
        num_sequences=len(weights_S),
        num_rows=num_rows,
        group_sizes_S=np.bincount(groups_S, weights_S)[groups_S].astype(np.float32),
        num_groups=-(-len(weights_S) // microbatch_sequences),
    )


def make_row(
    planned: PlannedRow,
    row_length: int,
    pad_id: int,
    weights: LabelWeights = ANSWERS,
    kind: str = GenerativeStream.kind,
) -> PackedRow:
    """A row of texts and conversations.

    Args:
        planned: the segments of the row.
        row_length: T.
        pad_id: token of the padding.
        weights: of the labels.
        kind: name of the kind that trains on it.

    Raises:
        DataError: a damaged source.
    """
    _, row = start_row(kind, False, planned.segments, row_length, pad_id)
    tokens_T = row.tokens_1T[0].numpy()
    mask_1T = np.zeros((1, row_length), dtype=np.float32)
    labels_1T = np.zeros((1, row_length), dtype=np.int64)
    end = 0
    for segment in planned.segments:
        # Position t predicts token t + 1 of its own segment.
        begin, end = end, end + segment.length
        own_T = tokens_T[begin:end]
        labels_1T[0, begin : end - 1] = own_T[1:]
        mask_1T[0, begin : end - 1] = weights.of_tokens(segment.roles, segment.lengths, not segment.start, own_T)[1:]
    row.labels_1T, row.loss_mask_1T = torch.from_numpy(labels_1T), torch.from_numpy(mask_1T)
    row.slots_S = torch.from_numpy(planned.slots)
    return row


def add_teacher(row: PackedRow, planned: PlannedRow, teachers: Sequence[TopProbabilities]) -> None:
    """Give a row what a cache of a teacher says of its tokens.

    Args:
        row: of :func:`make_row`.
        planned: its segments.
        teachers: the cache of each source.

    Raises:
        DataError: a segment that begins within its record, which the teacher has read from its beginning.
    """
    row_length, size = row.tokens_1T.shape[1], teachers[0].top_k
    ids_TK = np.full((row_length, size), -1, dtype=np.int32)
    log_probs_TK1 = np.full((row_length, size + 1), -np.inf, dtype=np.float32)
    end = 0
    for segment in planned.segments:
        if segment.start:
            raise DataError(
                f"record {segment.name} is cut, and loss.teacher.cache is of whole records; set data.over_long to "
                "truncate"
            )
        begin, end = end, end + segment.length
        teacher = teachers[segment.source]
        ids_TK[begin:end], log_probs_TK1[begin:end] = teacher.read(segment.record, segment.length)
        ids_TK[end - 1] = -1  # what follows is not of the segment
    row.teacher_ids_TK, row.teacher_log_probs_TK1 = torch.from_numpy(ids_TK), torch.from_numpy(log_probs_TK1)


STREAM = GenerativeStream
