"""The sources of a blend: checked by their metadata, opened when a record is asked for, closed when many are open."""

from __future__ import annotations

import hashlib
import resource
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_grit.config.blend import BlendEntry, read_blend
from megatron_grit.config.schema import RunConfig
from megatron_grit.data.indexed.reader import IndexedMeta, describe_skipped, file_paths
from megatron_grit.data.indexed.records import IndexedRecords
from megatron_grit.data.indexed.roles import RowKind
from megatron_grit.data.text.tokenizer import Tokenizer
from megatron_grit.errors import ConfigError, DataError

_MOST_OPEN = 2048


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


class Sources:
    """The sources of one kind of a run.

    Args:
        config: the run.
        tokenizer: the tokenizer that the sources have to be built with.
        rules: what the kind asks of them.
        open_files: shared with the sources of other kinds.

    Raises:
        ConfigError: no source, or a blend that is not one.
        DataError: a source that is missing, damaged, empty, of another tokenizer or kind, or with segments that are too
            long.
    """

    def __init__(self, config: RunConfig, tokenizer: Tokenizer, rules: SourceRules, open_files: OpenFiles) -> None:
        self.rules = rules
        self.entries: list[BlendEntry] = read_blend(rules.prefixes, rules.key)
        if not self.entries:
            raise ConfigError(f"{rules.key} is empty, but training.objective {config.training.objective} needs it")
        self._open_files = open_files
        self._sources = [IndexedRecords(entry.path) for entry in self.entries]
        self.names = [entry.path for entry in self.entries]
        """Prefix of each source."""
        self.longest_segment = min(config.data.tokens_per_row, config.model.max_position_embeddings)
        """Tokens of the longest segment that a row and the model can take."""
        for source in self._sources:
            self._check(source, tokenizer)
            if rules.policy == "stop":
                self._check_longest(source, config)
            if config.data.checksum:
                open_files.use(source).verify()
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

    def _check(self, source: IndexedRecords, tokenizer: Tokenizer) -> None:
        meta, path = source.meta, file_paths(source.prefix)[2]
        if source.kind is not self.rules.records:
            raise DataError(f"holds {meta.kind} records and stands under {self.rules.key}", path=path)
        if meta.tokenizer_fingerprint != tokenizer.fingerprint:
            raise DataError(
                f"was built with another tokenizer than {tokenizer.path}; build it again or set data.tokenizer",
                path=path,
            )
        if meta.num_records == meta.num_skipped:
            raise DataError(f"holds no records{describe_skipped(meta.num_skipped)}", path=path)

    def _check_longest(self, source: IndexedRecords, config: RunConfig) -> None:
        meta = source.meta
        for limit, knob in (
            (config.data.tokens_per_row, "data.tokens_per_row"),
            (config.model.max_position_embeddings, "model.max_position_embeddings"),
        ):
            longest = meta.longest_segment_tokens + self.rules.num_added
            if longest > limit:
                raise DataError(
                    f"record {source.name(meta.longest_segment_record)} has a segment of "
                    f"{longest} tokens{_of_these(self.rules.num_added)}, more than {knob} {limit}; raise it, build the "
                    f"file again with a lower limit, or set {self.rules.policy_key}",
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
