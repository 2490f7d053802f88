"""Pairs of answers, and rated answers: a number of records a step, or a number of full rows.

Both conversations of a pair stand in one row, one after the other, so that a row holds all that the loss of its pairs
is made of.

Shape suffix legend: T = tokens of a row, S = its segments, a conversation each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from megatron_grit.config.kinds import option
from megatron_grit.config.schema import RunConfig
from megatron_grit.data.indexed.label_weights import LabelWeights
from megatron_grit.data.indexed.roles import Role, RowKind, split_conversations
from megatron_grit.data.kinds import generative
from megatron_grit.data.order.sampler import stream_of
from megatron_grit.data.order.sources import SourceRules
from megatron_grit.data.rows.batch import PackedRow
from megatron_grit.data.rows.packing import pack
from megatron_grit.data.rows.segments import OverLong, Segment, spans_between, too_long
from megatron_grit.data.rows.stream import PlannedRow
from megatron_grit.data.text.tokenizer import Tokenizer
from megatron_grit.errors import ConfigError, DataError

LEAD_AND_TEXT = (Role.USER, Role.CHOSEN)
_RATED_ROLES = (Role.CHOSEN, Role.REJECTED)
RATED = LabelWeights(by_role=tuple(float(role in _RATED_ROLES) for role in Role))
"""Each token of a rated answer is a label."""


@dataclass(frozen=True, kw_only=True)
class PreferenceCounts:
    """What the losses are divided by, counted over the global batch."""

    num_records: int
    """Pairs and single answers."""
    num_chosen: int
    """Preferred and desirable answers."""
    num_rejected: int
    """Answers that others are preferred to, and undesirable ones."""
    num_labels: int
    """Tokens of all these answers."""
    num_chosen_labels: int
    """Tokens of the preferred and desirable ones."""

    @property
    def num_samples(self) -> int:
        """Records."""
        return self.num_records

    @property
    def num_segments(self) -> int:
        """Conversations."""
        return self.num_chosen + self.num_rejected


class PreferenceStream(generative.GenerativeStream):
    """So many records a step, each packed as a whole, in an order of their own.

    A kind whose section has ``over_long`` and ``rows`` too is a subclass with a name of its own.

    Raises:
        ConfigError, DataError: as for the stream of texts.
    """

    kind = "preference"
    reads_texts = False
    record_draws = stream_of("preference")
    rows_key = "preference.rows"

    def open_beside(self, config: RunConfig, tokenizer: Tokenizer) -> None:
        """Nothing is read beside the records."""
        loss = config.preference.loss  # type: ignore[attr-defined]
        self._takes_single = loss == "kto"
        self._why_pairs = f"preference.loss {loss} compares two; set it to kto, or"

    @staticmethod
    def labels(config: RunConfig, tokenizer: Tokenizer) -> LabelWeights:
        """As in the base class: rated answers, whatever the run weighs the labels of texts by."""
        return RATED

    @classmethod
    def over_long(cls, config: RunConfig) -> OverLong:
        """As in the base class."""
        policy: OverLong = option(config, cls.kind).over_long
        return policy

    @classmethod
    def rules(cls, config: RunConfig, tokenizer: Tokenizer) -> SourceRules:
        """As in the base class."""
        return replace(
            generative.source_rules(config, cls.kind),
            records=RowKind.PREFERENCE,
            policy=cls.over_long(config),
            policy_key=f"{cls.kind}.over_long",
            shares_row=True,
        )

    @classmethod
    def full_rows(cls, config: RunConfig) -> int | None:
        """As in the base class."""
        if config.data.packing == "step":
            return None
        rows: int | None = option(config, cls.kind).rows
        if rows is None:
            raise ConfigError(f"data.packing window needs {cls.rows_key}: the rows of preferences of a step")
        return rows

    def segments(self, step: int) -> list[Segment]:
        """As in the base class: the conversations of each record, one after the other."""
        if self._plan is not None:
            return super().segments(step)
        return [segment for unit in self.units(step) for segment in unit]

    def units(self, step: int) -> list[list[Segment]]:
        """As in the base class: a record's conversations stand in one row."""
        start = step * self._num_sequences
        sources, records = self._slots(start, start + self._num_sequences)
        every = [self.segments_of(*slot) for slot in zip(sources.tolist(), records.tolist(), strict=True)]
        units = [unit for unit in every if unit]
        if not units:
            raise DataError(
                f"step {step}: all of its {self._num_sequences} records are too long, and {self.kind}.over_long is "
                f"{self._policy}; raise data.tokens_per_row"
            )
        return units

    def segments_of(self, source: int, record: int) -> list[Segment]:
        """The conversations of a record; none of one that is left out."""
        roles, lengths = self._spans(source, record)
        bounds = split_conversations(roles)
        if len(bounds) < 2 and not self._takes_single:
            raise DataError(
                f"record {self.sources[source].name(record)} has a single answer, and {self._why_pairs} give pairs"
            )
        sizes = [sum(lengths[first:last]) for first, last in bounds]
        kept = self._kept(source, record, sizes)
        made, begin = [], 0
        for (first, last), size, stay in zip(bounds, sizes, kept, strict=True):
            made.append(self._conversation(source, record, roles[first:last], lengths[first:last], begin, stay))
            begin += size
        return made if made and all(segment.num_labels for segment in made) else []

    def measured(self, source: int, record: int) -> list[tuple[int, Segment]]:
        """All that a reference is asked about a record, each with its place among the :attr:`width` numbers of it: its
        conversations, and with kto what :meth:`mismatched` makes of them."""
        every = self.segments_of(source, record)
        if self._takes_single:
            every = every + [self.mismatched(segment) for segment in every]
        return [(place_of(segment), segment) for segment in every]

    @property
    def width(self) -> int:
        """Most of :meth:`measured`."""
        return 4 if self._takes_single else 2

    def mismatched(self, segment: Segment) -> Segment:
        """A conversation with the answer of another record in place of its own, cut to what a row and the model take.

        The other record is half of the source away, so that it is the same in every step, and what a reference says of
        it can be kept.
        """
        source, size = segment.source, self.sources.meta(segment.source).num_records
        other = (segment.record + size // 2) % size
        if other == segment.record:
            raise DataError(
                f"{self.sources.names[source]} holds one record, and preference.loss kto needs the answer of another; "
                "join it with other files"
            )
        roles, lengths = self._spans(source, other)
        bounds = split_conversations(roles)
        first, last = bounds[min(int(segment.start > 0), len(bounds) - 1)]
        answer = next(place for place in range(first, last) if roles[place] in _RATED_ROLES)
        lead = next(place for place, role in enumerate(segment.roles) if role in _RATED_ROLES)
        begin, head = sum(lengths[:answer]), sum(segment.lengths[:lead])
        own = [*segment.roles[:lead], *roles[answer:last]]
        sizes = [*segment.lengths[:lead], *lengths[answer:last]]
        stop = min(sum(sizes), self.sources.longest_segment)
        made = self._conversation(source, segment.record, own, sizes, segment.start, stop)
        rest = self._conversation(source, other, roles[answer:last], lengths[answer:last], begin, stop - head)
        return replace(made, stop=segment.start + head, rest=rest)

    def baseline_rows(self, step: int) -> list[PlannedRow]:
        """As in the base class: for each conversation an answer to another prompt, of which kto estimates its KL."""
        if not self._takes_single:
            return []
        every = [self.mismatched(segment) for segment in self.segments(step)]
        packed = pack(np.array([segment.length for segment in every]), self._tokens_per_row, self._num_rows_multiple)
        return [PlannedRow(segments=[every[slot] for slot in slots], slots=slots) for slots in packed]

    def _kept(self, source: int, record: int, sizes: list[int]) -> list[int]:
        """Tokens that stay of each conversation; none where the record is left out."""
        each, together = self.sources.longest_segment, self.sources.longest_unit
        if max(sizes) <= each and sum(sizes) <= together:
            return sizes
        if self._policy == "stop":
            raise too_long(self.sources, source, record, sum(sizes))
        return [0] * len(sizes) if self._policy == "drop" else fit(sizes, each, together)

    def _conversation(
        self, source: int, record: int, roles: list[int], lengths: list[int], begin: int, size: int
    ) -> Segment:  # many: a stretch of a record and its spans
        roles, lengths = spans_between(roles, lengths, 0, size)
        num_labels, label_weight = RATED.total(roles, lengths, True)
        return Segment(
            sources=self.sources,
            source=source,
            record=record,
            start=begin,
            stop=begin + size,
            roles=roles,
            lengths=lengths,
            num_labels=num_labels,
            label_weight=label_weight,
        )

    def _piece(self, piece: tuple[int, int, int, int, int]) -> list[Segment]:
        source, record, _, stop, _ = piece
        made = self.segments_of(source, record)
        size = sum(segment.length for segment in made)
        if size != stop:
            name = self.sources[source].name(record)
            raise DataError(f"record {name} gives {size} tokens, not the {stop} that were planned with")
        return made

    def _ranges(self, source: int, record: int, roles: list[int], lengths: list[int]) -> list[tuple[int, int]]:
        """One range, as long as what stays of the record: both conversations may lose their ends."""
        size = sum(segment.length for segment in self.segments_of(source, record))
        return [(0, size)] if size else []

    def visited(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Source and record of all that the steps from ``start`` to ``stop - 1`` take, in their order: int64 each."""
        if self._plan is None:
            return self._slots(start * self._num_sequences, stop * self._num_sequences)
        assert self._num_rows is not None
        pieces = np.concatenate(self._plan.rows(start * self._num_rows, stop * self._num_rows))
        return pieces["source"].astype(np.int64), pieces["record"]

    def counts(self, rows: Sequence[PlannedRow], data_size: int) -> PreferenceCounts:  # type: ignore[override]
        """As in the base class."""
        every = [segment for row in rows for segment in row.segments]
        chosen = [segment for segment in every if is_chosen(segment)]
        return PreferenceCounts(
            num_records=sum(is_chosen(segment) or segment.start == 0 for segment in every),
            num_chosen=len(chosen),
            num_rejected=len(every) - len(chosen),
            num_labels=sum(segment.num_labels for segment in every),
            num_chosen_labels=sum(segment.num_labels for segment in chosen),
        )

    def make_row(self, row: PlannedRow, row_length: int, pad_id: int) -> PackedRow:
        """As in the base class."""
        return make_row(row, row_length, pad_id)


def is_chosen(segment: Segment) -> bool:
    """Whether a conversation's answers are the preferred ones, or desirable. One that is cut may end between them."""
    return Role.CHOSEN in segment.roles


def place_of(segment: Segment) -> int:
    """Place of a conversation among those of its record: 0, or 1 for the second of a pair; and 2 more where it has the
    answer of another record."""
    return int(segment.start > 0) + 2 * (segment.rest is not None)


def fit(sizes: Sequence[int], each: int, together: int) -> list[int]:
    """Sizes cut to what one conversation, and all of a record, may have: the longer one loses more, down to the other.

    Args:
        sizes: tokens of one or two conversations.
        each: most tokens of one.
        together: most tokens of all.
    """
    cut = [min(size, each) for size in sizes]
    if sum(cut) <= together:
        return cut
    if len(cut) == 1:
        return [together]
    shorter = min(*cut, together // 2)
    longer = together - shorter
    return [shorter, min(cut[1], longer)] if cut[0] <= cut[1] else [min(cut[0], longer), shorter]


def make_row(planned: PlannedRow, row_length: int, pad_id: int) -> PackedRow:
    """A row of conversations.

    Args:
        planned: the segments of the row.
        row_length: T.
        pad_id: token of the padding.

    Raises:
        DataError: a damaged source.
    """
    row = generative.make_row(planned, row_length, pad_id, RATED, PreferenceStream.kind)
    sizes = np.diff(row.cu_seqlens.numpy())
    row.segment_ids_T = torch.from_numpy(np.repeat(np.arange(len(sizes)), sizes))  # of padding, which is last, S
    row.is_chosen_S = torch.tensor([is_chosen(segment) for segment in planned.segments], dtype=torch.bool)
    records = [(segment.source, segment.record, place_of(segment)) for segment in planned.segments]
    row.records_S3 = torch.tensor(records, dtype=torch.int64).view(-1, 3)
    return row


STREAM = PreferenceStream
