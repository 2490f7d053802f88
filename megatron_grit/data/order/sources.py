"""The sources of a blend: checked by their metadata, opened when a record is asked for, closed when many are open."""

from __future__ import annotations

import hashlib
import resource
import sys
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_grit.config.blend import BlendEntry, read_blend
from megatron_grit.config.kinds import made_by
from megatron_grit.config.schema import RunConfig
from megatron_grit.data.indexed.reader import IndexedMeta, describe_skipped, file_paths
from megatron_grit.data.indexed.records import IndexedRecords
from megatron_grit.data.indexed.roles import RowKind
from megatron_grit.data.text.tokenizer import Tokenizer
from megatron_grit.errors import ConfigError, DataError, GritError

_MOST_OPEN = 2048
_LOOKED_AT = 1 << 16
"""Records whose lengths are read at a time."""


class OpenFiles:
    """Closes the source that was used longest ago when too many are open.

    Args:
        limit: most open sources. None: a quarter of the files that this process may have open, at most 2,048.
    """

    def __init__(self, limit: int | None = None) -> None:
        if limit is None:
            allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
            limit = _MOST_OPEN if allowed < 0 else max(1, min(_MOST_OPEN, allowed // 4))
        self.limit = limit
        self._used: OrderedDict[int, IndexedRecords] = OrderedDict()

    def use(self, source: IndexedRecords) -> IndexedRecords:
        """Note that ``source`` is about to be read."""
        number = id(source)
        if number in self._used:
            self._used.move_to_end(number)
            return source
        while len(self._used) >= self.limit:
            self._used.popitem(last=False)[1].close()
        self._used[number] = source
        return source


@dataclass(frozen=True, kw_only=True)
class SourceRules:
    """What a kind of row asks of its sources."""

    key: str
    """The configuration's key that names them."""
    prefixes: Sequence[str]
    """Its value."""
    records: RowKind
    """Kind of their records."""
    policy: str
    """What becomes of a segment that is too long; "stop" refuses its source."""
    policy_key: str
    """The configuration's key that says so."""
    num_added: int = 0
    """Tokens that are put into each segment when it is read."""
    segments: str = "records"
    """What a segment is called in messages."""
    least_records: int = 1
    """Records that each source must have."""
    batch_key: str = ""
    """The configuration's key that says so, where it is above 1."""
    group_size: int = 1
    """Passages of a query; above 1, every record needs a negative."""
    shares_row: bool = False
    """Whether the segments of a record stand in one row. Then a row's tokens limit the record, and positions each of
    its segments."""


class Sources:
    """The sources of one kind of a run.

    Args:
        config: the run.
        tokenizer: the tokenizer that the sources have to be built with.
        rules: what the kind asks of them.
        open_files: shared with the sources of other kinds.

    Raises:
        ConfigError: no source, a blend that is not one, or a source with fewer records than a batch, or without the
            negatives that it needs.
        DataError: a source that is missing, damaged, empty, of another tokenizer or kind, or with segments that are too
            long.
    """

    def __init__(self, config: RunConfig, tokenizer: Tokenizer, rules: SourceRules, open_files: OpenFiles) -> None:
        self.rules = rules
        self.entries: list[BlendEntry] = _read_entries(config, rules)
        self._open_files = open_files
        self._sources: list[IndexedRecords] = []
        self.names = [entry.path for entry in self.entries]
        """Prefix of each source."""
        self.longest_segment = longest_segment(config)
        """Tokens of the longest segment that a row and the model can take."""
        self.longest_unit = longest_unit(config, rules)
        """Tokens of the longest unit of packing: a segment, or a record whose segments share a row."""
        for entry in self.entries:
            source = IndexedRecords(entry.path)
            self._sources.append(source)
            for error in _meta_errors(entry, source, config, tokenizer, rules):
                raise error
            if config.data.checksum:
                open_files.use(source).verify()
        if (none_left := _none_left(self._sources, config, rules)) is not None:
            raise none_left
        self.sizes = np.array([len(source) - source.meta.num_skipped for source in self._sources], dtype=np.int64)
        """Records of each source that are trained on: int64 [num_sources]."""
        self._gaps: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self._sources)

    def __getitem__(self, index: int) -> IndexedRecords:
        return self._open_files.use(self._sources[index])

    def meta(self, index: int) -> IndexedMeta:
        """Metadata of a source."""
        return self._sources[index].meta

    def trained_records(self, sources: np.ndarray, places: np.ndarray) -> np.ndarray:
        """Record of each place from 0 to the source's size - 1, skipping those without a token to predict: int64.

        Raises:
            DataError: a damaged index.
        """
        records = places.copy()
        for source in np.unique(sources).tolist():
            if source not in self._gaps:  # how many records are trained on before each that is skipped
                skipped = self[source].skipped()
                self._gaps[source] = skipped - np.arange(len(skipped))
            chosen = sources == source
            records[chosen] += np.searchsorted(self._gaps[source], places[chosen], side="right")
        return records

    def record_lengths(self, index: int, records: np.ndarray) -> np.ndarray:
        """Tokens of some records of a source: int64.

        Raises:
            DataError: a damaged index.
        """
        file = self[index].file
        _, lengths = file.extents(records)
        wrong = (lengths <= 0) | (lengths > self[index].meta.longest_segment_tokens)
        if not wrong.any():
            return lengths
        name = self[index].name(int(records[wrong][0]))
        raise DataError(f"record {name} has no possible length; build the file again", path=file.idx_path)

    def identity(self, indices: Sequence[int] | None = None) -> list[str]:
        """What the content of sources is known by: the checksum of each one's metadata, which holds theirs.

        A source that was written without checksums is known by its metadata and by its files' times.
        """
        return [_identity(self._sources[index]) for index in (range(len(self)) if indices is None else indices)]


def longest_segment(config: RunConfig) -> int:
    """Tokens of the longest segment that a row and the model of a run can take."""
    return min(config.data.tokens_per_row, config.model.max_position_embeddings)


def longest_unit(config: RunConfig, rules: SourceRules) -> int:
    """Tokens of the longest segment of a source's records, or record, that is not too long."""
    return config.data.tokens_per_row if rules.shares_row else longest_segment(config)


def find_errors(config: RunConfig, tokenizer: Tokenizer, rules: SourceRules) -> Iterator[GritError]:
    """All that :class:`Sources` and the first look at a source's index refuse; arguments as there.

    Reads each source's ``.json`` and the header and ends of its ``.idx``.
    """
    try:
        entries = _read_entries(config, rules)
    except ConfigError as error:
        yield error
        return
    good: list[IndexedRecords] = []
    for entry in entries:
        try:
            source = IndexedRecords(entry.path)
            errors: list[GritError] = list(_meta_errors(entry, source, config, tokenizer, rules))
            _ = source.file
            source.close()
        except DataError as error:
            errors = [error]
        else:
            good += [] if errors else [source]
        yield from errors
    if len(good) == len(entries) and (none_left := _none_left(good, config, rules)) is not None:
        yield none_left


def _read_entries(config: RunConfig, rules: SourceRules) -> list[BlendEntry]:
    entries = read_blend(rules.prefixes, rules.key)
    if not entries:
        raise ConfigError(
            f"{rules.key} is empty, but training.objective {config.training.objective} needs it; give files of "
            f"{made_by(rules.key)}"
        )
    return entries


def _meta_errors(
    entry: BlendEntry, source: IndexedRecords, config: RunConfig, tokenizer: Tokenizer, rules: SourceRules
) -> Iterator[GritError]:
    """What a source's metadata tells against it."""
    meta, path = source.meta, file_paths(source.prefix)[2]
    if source.kind is not rules.records:
        yield DataError(
            f"holds {meta.kind} records and stands under {rules.key}, which takes files of {made_by(rules.key)}",
            path=path,
        )
        return
    if (problem := meta.other_tokenizer(tokenizer.path, tokenizer.fingerprint)) is not None:
        yield DataError(f"{problem}; build it again or set data.tokenizer", path=path)
    count = meta.num_records - meta.num_skipped
    count = count if entry.cap is None else min(count, entry.cap)
    if not count:
        yield DataError(f"holds no records{describe_skipped(meta.num_skipped)}", path=path)
    elif count < rules.least_records:
        yield ConfigError(
            f"source {source.prefix} has {count} records, fewer than {rules.batch_key} {rules.least_records}: an "
            f"embedding batch comes from one source; lower {rules.batch_key}, or join sources with merge_indexed"
        )
    if rules.group_size > 1 and count and meta.min_negatives == 0:
        yield ConfigError(
            f"data.train_group_size {rules.group_size} needs negatives, and {source.prefix} has records without any; "
            "set data.train_group_size to 1, or add negatives to every record"
        )
    if rules.policy == "stop":
        yield from _longest_errors(source, config, rules)


def _none_left(sources: Sequence[IndexedRecords], config: RunConfig, rules: SourceRules) -> ConfigError | None:
    """Records that are all too long, and left out for it. Lengths are read up to the first record that is not."""
    limit, shortest = longest_unit(config, rules) - rules.num_added, sys.maxsize
    if rules.policy != "drop" or any(source.meta.longest_segment_tokens <= limit for source in sources):
        return None
    for source in sources:
        try:
            for start in range(0, len(source), _LOOKED_AT):
                lengths = source.segment_lengths(np.arange(start, min(start + _LOOKED_AT, len(source))))
                shortest = min(shortest, int(lengths.min(initial=shortest)))
                if shortest <= limit:
                    return None
        finally:
            source.close()
    return ConfigError(
        f"{rules.key}: all {sum(map(len, sources)):,} {rules.segments} are longer than {row_knob(config, rules)} "
        f"{longest_unit(config, rules):,}, the shortest has {shortest:,} tokens, and {rules.policy_key} drop leaves "
        f"none; raise it, or set {rules.policy_key} to truncate or split"
    )


def row_knob(config: RunConfig, rules: SourceRules) -> str:
    """The configuration's key that limits a segment, or a record whose segments share a row."""
    if rules.shares_row:
        return "data.tokens_per_row"
    rows, positions = config.data.tokens_per_row, config.model.max_position_embeddings
    return "model.max_position_embeddings" if rows > positions else "data.tokens_per_row"


def _longest_errors(source: IndexedRecords, config: RunConfig, rules: SourceRules) -> Iterator[DataError]:
    meta, longest = source.meta, source.meta.longest_segment_tokens + rules.num_added
    limits = [(config.data.tokens_per_row, "data.tokens_per_row")]
    if not rules.shares_row:  # the index does not tell the segments of a record, which are looked at when it is read
        limits.append((config.model.max_position_embeddings, "model.max_position_embeddings"))
    for limit, knob in limits:
        if longest > limit:
            yield DataError(
                f"record {source.name(meta.longest_segment_record)} has a segment of {longest} tokens"
                f"{_of_these(rules.num_added)}, more than {knob} {limit}; raise it, build the file again with a lower "
                f"limit, or set {rules.policy_key}",
                path=file_paths(source.prefix)[2],
            )


def _of_these(num_added: int) -> str:
    return f", {num_added} of them from embedding.brackets and side_tokens" if num_added else ""


def _identity(source: IndexedRecords) -> str:
    digest = hashlib.sha256(source.meta.to_json().encode())
    if not source.meta.bin_sha256:
        for path in file_paths(source.prefix)[:2]:
            digest.update(str(path.stat().st_mtime_ns).encode())
    return digest.hexdigest()
