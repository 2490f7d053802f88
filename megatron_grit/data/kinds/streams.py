"""The two streams of a run as segments: the texts of a step's queries, and generative sequences or rows of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megatron_grit.config.schema import RunConfig
from megatron_grit.data.indexed.roles import Role, RowKind, split_segments
from megatron_grit.data.order.blend import RecordOrder, blend_weights
from megatron_grit.data.order.sampler import (
    EmbeddingSampler,
    GenerativeSampler,
    Stream,
    passage_draws,
    pick_passages,
    stream_key,
)
from megatron_grit.data.order.shared_texts import BoundRecords, find_bound_records
from megatron_grit.data.order.sources import OpenFiles, Sources
from megatron_grit.data.rows.row_plan import PIECE, RowPlan
from megatron_grit.data.rows.segments import Segment, labels_between, ranges, spans_between, too_long
from megatron_grit.data.text.markers import load_markers
from megatron_grit.data.text.tokenizer import Tokenizer
from megatron_grit.errors import ConfigError, DataError
from megatron_grit.store.cache import cached

_CACHED_FROM_BYTES = 1 << 24
"""Size of a ``.bin`` from which its shared texts are kept in the index cache; a smaller one is read in no time."""


def cache_folder(config: RunConfig) -> str:
    """Where index caches are."""
    return config.data.cache_dir or str(Path(config.output_dir) / "cache")


class EmbeddingStream:
    """Queries with their passages, a batch a step.

    Raises:
        ConfigError: a batch that the data does not allow, or markers that the vocabulary has no tokens for.
        DataError: see :class:`~megatron_grit.data.order.sources.Sources`.
    """

    def __init__(self, config: RunConfig, tokenizer: Tokenizer, open_files: OpenFiles) -> None:
        self._config = config
        self._seed = config.training.seed
        self._policy = config.data.over_long_texts
        self._markers = load_markers(config.embedding, config.model.vocab_size, tokenizer)
        self.sources = Sources(config, tokenizer, RowKind.EMBEDDING, open_files, self._markers.query.num_tokens)
        self.num_queries, self.group_size = config.training.embedding_batch_size, config.data.train_group_size
        self._check_negatives()
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

    def _check_negatives(self) -> None:
        wanted = self.group_size - 1
        if wanted < 0:
            raise ConfigError(f"data.train_group_size {wanted + 1} is below 1")
        for index, name in enumerate(self.sources.names):
            if wanted and self.sources.meta(index).min_negatives == 0:
                raise ConfigError(
                    f"data.train_group_size {wanted + 1} needs negatives, and {name} has records without any; "
                    "set data.train_group_size to 1, or add negatives to every record"
                )

    def _bound_records(self, index: int) -> BoundRecords:
        if self.sources.meta(index).bin_bytes < _CACHED_FROM_BYTES:
            return find_bound_records(self.sources[index])
        key = {"what": "shared texts 1", "source": self.sources.identity([index])}
        arrays = cached(
            cache_folder(self._config), "shared_texts", key, lambda: vars(find_bound_records(self.sources[index]))
        )
        return BoundRecords(**arrays)

    def texts(self, step: int) -> tuple[str, list[Segment]]:
        """The source of a step, and its texts: all queries, then the passages of the first query, and so on.

        Raises:
            DataError: a record that breaks the grammar, or a text that is too long.
            ConfigError: no batch can be filled.
        """
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
        return source.prefix, queries + passages

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

    def counts(self, num_steps: int) -> dict[str, int]:
        """Queries of each source in the first steps."""
        return dict(zip(self.sources.names, self._sampler.counts(num_steps).tolist(), strict=True))


class GenerativeStream:
    """Texts and conversations: so many sequences a step, or so many full rows.

    Raises:
        ConfigError, DataError: as for :class:`EmbeddingStream`.
    """

    def __init__(self, config: RunConfig, tokenizer: Tokenizer, open_files: OpenFiles) -> None:
        self._policy = config.data.over_long
        self.sources = Sources(config, tokenizer, RowKind.GENERATIVE, open_files)
        self._num_sequences, self._num_rows = config.training.generative_batch_size, config.training.generative_rows
        entries, seed = self.sources.entries, config.training.seed
        key = stream_key(seed, Stream.GENERATIVE_RECORDS)
        order = RecordOrder(self.sources.sizes, [entry.cap for entry in entries], key)
        weights = blend_weights(entries, order.sizes)
        self._sampler = GenerativeSampler(order, weights)
        self._plan: RowPlan | None = None
        if config.data.packing == "window":
            identity = {
                "sources": self.sources.identity(),
                "weights": weights.tolist(),
                "sizes": order.sizes.tolist(),
                "seed": seed,
                "longest_segment": self.sources.longest_segment,
                "over_long": self._policy,
            }
            self._plan = RowPlan(
                self._pieces,
                config.data.tokens_per_row,
                config.data.packing_window,
                stream_key(seed, Stream.ROWS),
                cache_folder(config),
                identity,
            )

    def sequences(self, step: int) -> list[Segment]:
        """The sequences of a step, for the loader to pack.

        Raises:
            DataError: a record that breaks the grammar, has nothing to train on, or is too long.
        """
        start = step * self._num_sequences
        sources, records = self._sampler.slots(start, start + self._num_sequences)
        segments = []
        for source, record in zip(sources.tolist(), records.tolist(), strict=True):
            roles, lengths = self._spans(source, record)
            length = sum(lengths)
            for begin, end in self._ranges(source, record, roles, lengths):
                segments.append(self._segment(source, record, roles, lengths, begin, end))
            if length <= self.sources.longest_segment and not segments[-1].num_labels:
                raise self._nothing(source, record)
        if not segments:
            raise DataError(
                f"step {step}: all of its {self._num_sequences} sequences are too long, and data.over_long is "
                f"{self._policy}; raise data.tokens_per_row"
            )
        return segments

    def rows(self, step: int) -> list[list[Segment]]:
        """The rows of a step, each nearly full.

        Raises:
            DataError: as for :meth:`sequences`.
        """
        assert self._plan is not None and self._num_rows is not None
        planned = self._plan.rows(step * self._num_rows, (step + 1) * self._num_rows)
        return [[self._piece(piece) for piece in row.tolist()] for row in planned]

    def _piece(self, piece: tuple[int, int, int, int, int]) -> Segment:
        source, record, start, stop, _ = piece
        roles, lengths = self._spans(source, record)
        if stop > sum(lengths):
            name = self.sources[source].name(record)
            raise DataError(f"record {name} has {sum(lengths)} tokens, not the {stop} that were planned with")
        segment = self._segment(source, record, roles, lengths, start, stop)
        if not segment.num_labels:
            raise self._nothing(source, record)
        return segment

    def _spans(self, source: int, record: int) -> tuple[list[int], list[int]]:
        return self.sources[source].spans(record)

    def _nothing(self, source: int, record: int) -> DataError:
        return DataError(f"record {self.sources[source].name(record)} has no token to predict; build the file again")

    def _ranges(self, source: int, record: int, roles: list[int], lengths: list[int]) -> list[tuple[int, int]]:
        """What becomes of a record: pieces of one that is too long only where they have something to train on."""
        length, limit = sum(lengths), self.sources.longest_segment
        found = ranges(length, limit, self._policy)
        if length <= limit:
            return found
        if self._policy == "stop":
            raise too_long(self.sources, source, record, length)
        return [(start, stop) for start, stop in found if labels_between(roles, lengths, start, stop)]

    def _segment(
        self, source: int, record: int, roles: list[int], lengths: list[int], start: int, stop: int
    ) -> Segment:
        num_labels = labels_between(roles, lengths, start, stop)
        if stop - start < sum(lengths):
            roles, lengths = spans_between(roles, lengths, start, stop)
        return Segment(
            sources=self.sources,
            source=source,
            record=record,
            start=start,
            stop=stop,
            roles=roles,
            lengths=lengths,
            num_labels=num_labels,
        )

    def _pieces(self, start: int, stop: int) -> np.ndarray:
        """The pieces of some slots, in their order: PIECE."""
        sources, records = self._sampler.slots(start, stop)
        lengths = np.empty(len(records), dtype=np.int64)
        for source in np.unique(sources).tolist():
            chosen = sources == source
            lengths[chosen] = self.sources.record_lengths(source, records[chosen])
        pieces = np.zeros(len(records), dtype=PIECE)
        pieces["source"], pieces["record"], pieces["stop"] = sources, records, lengths
        parts, done = [], 0
        for slot in np.flatnonzero(lengths > self.sources.longest_segment).tolist():
            source, record = int(sources[slot]), int(records[slot])
            found = self._ranges(source, record, *self._spans(source, record))
            parts.append(pieces[done:slot])
            parts.append(np.array([(source, record, begin, end, 0) for begin, end in found], dtype=PIECE))
            done = slot + 1
        return np.concatenate([*parts, pieces[done:]])

    def counts(self, num_steps: int) -> dict[str, int]:
        """Sequences of each source in the first steps; of records that are cut, each piece."""
        if self._plan is None:
            counts = self._sampler.counts(num_steps * self._num_sequences)
        else:
            assert self._num_rows is not None
            counts = self._plan.counts(num_steps * self._num_rows, len(self.sources))
        return dict(zip(self.sources.names, counts.tolist(), strict=True))
