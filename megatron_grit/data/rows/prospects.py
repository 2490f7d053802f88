"""What a run will make of its data, told before it starts: all that is refused, then epochs and what is too long.

A dry run and the start of a run say the same. Headers and metadata are read, the tables of a retrieval database are
opened, and, where records are too long, the lengths of a bounded number of records are read; no token.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import numpy as np

from megatron_grit.config.blend import BlendEntry, read_blend
from megatron_grit.config.checkpoint_folder import started_from
from megatron_grit.config.checks.checkpoint import checkpoint_errors, finished_lines, unlike_model, unlike_reader
from megatron_grit.config.kinds import compares_rows, kind_batch_size, kind_options, load_kind, trained_kinds
from megatron_grit.config.schema import RunConfig
from megatron_grit.config.shape import reads_neighbors
from megatron_grit.data.chat.chat import Chat, chat_of_file, is_known
from megatron_grit.data.chat.run_chat import run_chat, unlike_base
from megatron_grit.data.indexed.records import IndexedRecords
from megatron_grit.data.indexed.roles import split_texts
from megatron_grit.data.order.blend import blend_weights
from megatron_grit.data.order.sources import OpenFiles, SourceRules, Sources, find_errors, longest_unit, row_knob
from megatron_grit.data.rows.held_out import HeldOutStream
from megatron_grit.data.rows.loader import KINDS
from megatron_grit.data.rows.neighbor_versions import NEWEST, NeighborVersions, first_version
from megatron_grit.data.rows.stream import RowStream
from megatron_grit.data.text.tokenizer import Tokenizer, load_tokenizer
from megatron_grit.errors import ConfigError, GritError

_BLOCKS, _RECORDS_OF_BLOCK = 64, 256
"""Stretches of records that are looked at in all sources together, and the length of each."""
_SOURCES_NAMED = 5
_WHAT_HAPPENS = {"drop": "leaves them out", "truncate": "cuts off their end", "split": "cuts them into pieces"}


def look_ahead(config: RunConfig) -> tuple[list[GritError], list[str]]:
    """What the start of a run would refuse of its tokenizer and data, and what it would say of them.

    Args:
        config: without contradictions, of files that are there.
    """
    assert config.data.tokenizer is not None
    try:
        tokenizer = load_tokenizer(config.data.tokenizer)
    except GritError as error:
        return [error], []
    errors = list(data_errors(config, tokenizer))
    errors = errors or list(neighbor_errors(config, tokenizer))
    errors += checkpoint_errors(config)
    try:
        chat = run_chat(config, tokenizer, started_from(config))
        lines = [] if errors else [*finished_lines(config), *prospects(config, tokenizer, chat)]
    except GritError as error:
        return [*errors, error], []
    return errors, lines


def data_errors(config: RunConfig, tokenizer: Tokenizer) -> Iterator[GritError]:
    """Everything that :class:`~megatron_grit.data.rows.loader.GritDataLoader` refuses of a run's data, as far as
    metadata and headers tell; it raises the first of them."""
    streams: list[type[RowStream]] = list(_streams(config).values())
    for stream in streams + [HeldOutStream] * bool(config.data.valid):
        try:
            rules = stream.rules(config, tokenizer)
        except ConfigError as error:
            yield error
        else:
            yield from find_errors(config, tokenizer, rules)


def neighbor_errors(config: RunConfig, tokenizer: Tokenizer) -> Iterator[GritError]:
    """What the loader refuses of the retrieval database that the rows of a run read: one error for texts that are
    trained on and one for held-out ones. Arguments as for :func:`data_errors`, which finds nothing."""
    if not reads_neighbors(config.model):
        return
    streams = [stream for kind, stream in _streams(config).items() if not kind_options(kind).EMBEDS]
    every, read = streams + [HeldOutStream] * bool(config.data.valid), []
    for stream in every:
        try:
            found = NeighborVersions(config, Sources(config, tokenizer, stream.rules(config, tokenizer), OpenFiles()))
            first_version(config, [found])
        except GritError as error:
            yield error
        else:
            read.append(found)
    if len(every) == len(read) > 1 and config.data.retro_version == NEWEST:
        try:
            first_version(config, read)  # each may have one, and another one
        except GritError as error:
            yield error


def prospects(config: RunConfig, tokenizer: Tokenizer, chat: Chat) -> Iterator[str]:
    """Lines about data that is not refused: for each kind how often the steps go through it, and records that are
    longer than a row; and what of tokenizer, template and chunks the base has otherwise.

    Raises:
        GritError: as of :func:`data_errors`.
    """
    for kind, stream in _streams(config).items():
        rules = stream.rules(config, tokenizer)
        entries = read_blend(rules.prefixes, rules.key)
        sources = [IndexedRecords(entry.path) for entry in entries]
        if config.training.steps:
            yield _epochs(config, kind, entries, sources)
        yield from _too_long(config, rules, sources)
        if stream.reads_ends:
            yield from _without_end(tokenizer, rules, sources)
    yield from unlike_base(config, tokenizer, chat)
    yield from unlike_model(config)
    yield from unlike_reader(config)


def _streams(config: RunConfig) -> dict[str, type[RowStream]]:
    return {kind: load_kind(KINDS, kind).STREAM for kind in trained_kinds(config)}


def _epochs(config: RunConfig, kind: str, entries: list[BlendEntry], sources: Sequence[IndexedRecords]) -> str:
    """How often the steps go through the records of a kind."""
    steps, one_source = config.training.steps, compares_rows(kind)
    counts = [source.meta.num_records - source.meta.num_skipped for source in sources]
    sizes = np.array(
        [count if entry.cap is None else min(count, entry.cap) for count, entry in zip(counts, entries, strict=True)]
    )
    batch, rows = kind_batch_size(config, kind), load_kind(KINDS, kind).STREAM.full_rows(config)
    weights = blend_weights(entries, sizes // batch if one_source else sizes)
    if one_source:  # a step's records are of one source
        weights = weights ** (1 / config.data.embedding_temperature)
    shares, total, unit = weights / weights.sum(), sizes.sum(), "records"
    if rows is not None:  # of so many tokens; records come in their shares
        tokens = np.array([source.meta.num_tokens / source.meta.num_records for source in sources])
        shares, sizes, unit = shares * tokens / (shares @ tokens), sizes * tokens, "tokens"
        batch, total = rows * config.data.tokens_per_row, round(sizes.sum())
    each = steps * batch * shares / sizes
    line = f"{kind_options(kind).DATA}: {steps:,} steps of {batch:,} {unit} are {_number(steps * batch / total)} epochs"
    line += f" of its {total:,} {unit}"
    if len(sizes) > 1:
        least, most = int(each.argmin()), int(each.argmax())
        line += (
            f", from {_number(each[least])} of {entries[least].path} to {_number(each[most])} of {entries[most].path}"
        )
    if batch > total:
        line += f"; a step takes more than there are, so each record comes {_number(batch / total)} times in every step"
    return line


def _too_long(config: RunConfig, rules: SourceRules, sources: Sequence[IndexedRecords]) -> Iterator[str]:
    limit = longest_unit(config, rules) - rules.num_added
    found = [source for source in sources if source.meta.longest_segment_tokens > limit]
    knob, what = row_knob(config, rules), rules.segments
    for source in found[:_SOURCES_NAMED]:
        looked_at = _some(len(source), max(1, _BLOCKS // len(found)))
        lengths = _lengths(source, looked_at)
        long = lengths[lengths > limit]
        lost = int(long.sum()) - (limit * len(long) if rules.policy == "truncate" else 0)
        part = len(looked_at) < len(source)
        line = f"{source.prefix}: {len(long):,} of {len(lengths):,} {what}"
        line += f" that were looked at ({100 * len(long) / max(1, len(lengths)):.2g} %)" if part else ""
        line += f" are longer than {knob} {longest_unit(config, rules):,}, the longest has "
        line += f"{source.meta.longest_segment_tokens + rules.num_added:,} tokens: {rules.policy_key} {rules.policy} "
        line += _WHAT_HAPPENS[rules.policy]
        if rules.policy != "split":
            line += f", {100 * lost / max(1, int(lengths.sum())):.2g} % of the tokens"
        yield line
    if len(found) > _SOURCES_NAMED:
        yield f"{rules.key}: {len(found) - _SOURCES_NAMED} further sources have {what} that are longer than {knob}"


def _without_end(tokenizer: Tokenizer, rules: SourceRules, sources: Sequence[IndexedRecords]) -> Iterator[str]:
    """A warning of conversations that their build has cut, of all sources together."""
    cut = looked_at = 0
    first = None
    for source in sources:
        limit = source.meta.conversation_limit
        if limit is None or source.meta.longest_segment_tokens < limit:
            continue
        found, count = _cut_off(source, limit, _ends(source, tokenizer), max(1, _BLOCKS // len(sources)))
        cut, looked_at, first = cut + found, looked_at + count, first or (source.prefix if found else None)
    if cut:
        yield (
            f"warning: {rules.key}: {cut:,} of {looked_at:,} answers that were looked at were cut at "
            f"--generative-max-len when they were built, as in {first}: they have no end, at which they would be read; "
            "build them with a larger one, or with --over-long drop or terminate"
        )


def _ends(source: IndexedRecords, tokenizer: Tokenizer) -> Collection[int]:
    """Tokens that end an answer of a source."""
    meta = source.meta
    if is_known(meta.template, meta.template_source, tokenizer):
        return chat_of_file(meta.template, meta.template_source, tokenizer).end_ids
    return (tokenizer.eos_id,)


def _cut_off(source: IndexedRecords, limit: int, ends: Collection[int], blocks: int) -> tuple[int, int]:
    """How many conversations of evenly spread records were cut at a number of tokens, and how many were looked at."""
    cut = count = 0
    try:
        for record in _some(len(source), blocks).tolist():
            roles, lengths = source.spans(record)
            begin = 0
            for first, last in split_texts(roles):
                size = sum(lengths[first:last])
                begin, count = begin + size, count + 1
                if size >= limit:
                    cut += int(source.tokens(record, begin - 1, 1)[0]) not in ends
    finally:
        source.close()
    return cut, count


def _some(count: int, blocks: int) -> np.ndarray:
    """Numbers of records in evenly spread blocks, or of all where they are few: int64."""
    if count <= blocks * _RECORDS_OF_BLOCK:
        return np.arange(count)
    starts = np.linspace(0, count - _RECORDS_OF_BLOCK, blocks).astype(np.int64)
    return (starts[:, None] + np.arange(_RECORDS_OF_BLOCK)).ravel()


def _lengths(source: IndexedRecords, records: np.ndarray) -> np.ndarray:
    """Tokens of each segment of some records that are trained on: int64."""
    try:
        return source.segment_lengths(records)
    finally:
        source.close()


def _number(value: float) -> str:
    """Three digits, without an exponent."""
    return f"{float(f'{value:.3g}'):,g}"
