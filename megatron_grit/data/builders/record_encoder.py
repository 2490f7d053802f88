"""Turns records into token blocks in a worker of a build: filters of GRIT's training data, templates, length limits."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from megatron_grit.config.knob import Checked, knob
from megatron_grit.data.builders.block_encoder import EncodedBlock, Rejection
from megatron_grit.data.builders.filters import FINGERPRINT_BYTES, HeldOut, contents, fingerprint
from megatron_grit.data.chat.chat_format import Piece, renderings
from megatron_grit.data.chat.chat_templates import load_chat_format
from megatron_grit.data.chat.rated import RATED, rate_pieces
from megatron_grit.data.indexed.reader import token_dtype
from megatron_grit.data.indexed.roles import ANSWERS, Role, RowKind
from megatron_grit.data.indexed.writer import TokenBlock
from megatron_grit.data.text.line_blocks import LineBlock
from megatron_grit.data.text.preferences import parse_preference
from megatron_grit.data.text.records import CALL_KEYS, Message, Record, TextPair, parse_line
from megatron_grit.data.text.spans import Span, SpanTable, encode_units
from megatron_grit.data.text.templates import embedding_pieces
from megatron_grit.data.text.tokenizer import load_tokenizer
from megatron_grit.errors import ConfigError, DataError

OUTPUT = "records"
"""Name of the one output."""
BAD_LINE = "bad_line"
UNFIT = (
    *("empty_text", "instruction_too_long", "nothing_to_predict", "merged_answer", "template_refused"),
    "equal_answers",
)
"""Reasons for which a record is dropped without an option asking for it; often a mistake in the data."""

_CHARS_PER_TOKEN = 10
"""Before tokenising, texts are truncated to this many characters for each token of the largest limit."""
_PAIR_ROLES = {
    "query": (Role.QUERY_INSTRUCTION, Role.QUERY),
    "positive": (Role.POSITIVE_INSTRUCTION, Role.POSITIVE),
    "negative": (Role.NEGATIVE_INSTRUCTION, Role.NEGATIVE),
}
_INSTRUCTIONS = [int(instruction) for instruction, _ in _PAIR_ROLES.values()]


@dataclass(frozen=True, kw_only=True)
class Limits(Checked):
    """Longest texts in tokens, template included; longer ones are truncated."""

    query: int = knob(256, at_least=2)
    passage: int = knob(2048, at_least=2)
    generative: int = knob(2048, at_least=2)

    @property
    def max_chars(self) -> int:
        """Characters to which a string of an embedding record is truncated before it is tokenised."""
        return _CHARS_PER_TOKEN * max(self.query, self.passage, self.generative)


@dataclass(frozen=True, kw_only=True)
class EncoderOptions(Checked):
    """Options that decide how a record becomes tokens."""

    kind: RowKind
    tokenizer: str
    """Path, see :func:`~megatron_grit.data.text.tokenizer.load_tokenizer`."""
    template: str = "gritlm"
    """Of conversations, see :func:`~megatron_grit.data.chat.chat_templates.load_chat_format`."""
    limits: Limits = field(default_factory=Limits)
    over_long: Literal["drop", "truncate", "terminate", "split"] = "truncate"
    """What to do with a generative record that is longer than its limit. terminate: cut it, and end an answer that is
    cut with its end token. split: into several, conversations between turns."""
    turns: Literal["each", "last"] = "each"
    """Of a template that writes earlier answers otherwise: see
    :func:`~megatron_grit.data.chat.chat_format.renderings`."""
    min_tokens: int = knob(0, at_least=0)
    """Records with a text of fewer tokens, template included, are dropped."""
    max_tokens: int | None = knob(None, at_least=1)
    """Records with a text of more tokens before truncation are dropped."""
    held_out: tuple[str | Path, ...] = ()
    """Files; see :class:`~megatron_grit.data.builders.filters.HeldOut`."""
    ngram: int = knob(13, at_least=1)
    deduplicate: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_tokens is not None and self.max_tokens < self.min_tokens:
            raise ConfigError(f"no text has at least {self.min_tokens} and at most {self.max_tokens} tokens")


class _RejectedError(Exception):
    def __init__(self, reason: str, message: str, *, fatal: bool = False) -> None:
        super().__init__(message)
        self.reason, self.message, self.fatal = reason, message, fatal


@dataclass
class _Batch:
    """The records of a block and their texts."""

    records: list[Record] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    """What each text is."""
    units: list[list[Piece]] = field(default_factory=list)
    """Each text."""
    owners: list[int] = field(default_factory=list)
    """Index of each text's record."""
    rejected: dict[int, tuple[str, str]] = field(default_factory=dict)
    """Dropped records: reason and message."""
    num_cut_pieces: int = 0
    """Pieces of split conversations that were truncated."""
    num_unanswered: int = 0
    """Records that lost turns behind their last answer."""

    def reject(self, unit: int, reason: str, message: str) -> None:
        """Drop the record of a text. If it was dropped before, the first reason is kept."""
        self.rejected.setdefault(self.owners[unit], (reason, message))


class RecordEncoder:
    """Encodes blocks of JSONL lines; see :class:`~megatron_grit.data.builders.block_build.BlockEncoder`."""

    def __init__(self, options: EncoderOptions) -> None:
        self.options = options
        self.tokenizer = load_tokenizer(options.tokenizer)
        self.dtype = token_dtype(self.tokenizer.vocab_size)
        self.chat_format = load_chat_format(options.template, self.tokenizer)
        self._held_out = HeldOut(options.held_out, options.ngram) if options.held_out else None
        limits = options.limits
        self._limits = {"query": limits.query, "positive": limits.passage, "negative": limits.passage}
        self._limits |= dict.fromkeys(("text", "completion", "conversation", "turn", *RATED), limits.generative)

    def encode(self, block: LineBlock) -> EncodedBlock:
        lines = block.lines()
        batch = _Batch()
        rejections: list[Rejection] = []
        num_records = 0
        for number, line in enumerate(lines):
            if not line.strip():
                continue
            num_records += 1
            try:
                self._prepare(line, number, batch)
            except _RejectedError as error:
                rejections.append(Rejection(number, error.reason, error.message, fatal=error.fatal))
        tokens, owners, counters = self._encode_batch(batch)
        for record, (reason, message) in batch.rejected.items():
            rejections.append(Rejection(batch.lines[record], reason, message))
        rejections.sort(key=lambda rejection: rejection.line)
        return EncodedBlock(
            outputs={OUTPUT: tokens},
            num_lines=len(lines),
            num_records=num_records,
            rejections=rejections,
            counters=dict(counters),
            lines=np.array(batch.lines, dtype=np.int32)[owners],
            fingerprints=self._fingerprints(batch, owners),
        )

    def _prepare(self, line: bytes, number: int, batch: _Batch) -> None:
        try:
            kind = self.options.kind
            record = parse_preference(line) if kind is RowKind.PREFERENCE else parse_line(line)
        except DataError as error:
            raise _RejectedError(BAD_LINE, str(error)) from error
        if record.kind is not kind:
            raise _RejectedError(
                "mixed_kinds",
                f"a record of kind {record.kind.value} after records of kind {kind.value}; "
                "put the two kinds into separate files and build each with a prefix of its own",
                fatal=True,
            )
        if kind is RowKind.GENERATIVE:
            made = self._generative(record)
        else:
            made = [(record, self._texts(record) if kind is RowKind.EMBEDDING else self._rated(record))]
        if self._held_out is not None and (shared := self._held_out.overlap(contents(record))) is not None:
            raise _RejectedError("contaminated", f"shares these words with a held-out file: {shared}")
        batch.num_unanswered += any(each.is_unanswered for each in (record, *(side for _, side in record.rated)))
        for record, texts in made:
            for name, pieces in texts:
                batch.names.append(name)
                batch.units.append(pieces)
                batch.owners.append(len(batch.records))
            batch.records.append(record)
            batch.lines.append(number)

    def _texts(self, record: Record) -> list[tuple[str, list[Piece]]]:
        names = ["query"] + ["positive"] * len(record.positives) + ["negative"] * len(record.negatives)
        max_chars = self.options.limits.max_chars
        texts = []
        for name, pair in zip(names, record.pairs, strict=True):
            text = pair.text[:max_chars]
            if not text.strip():
                raise _RejectedError("empty_text", f"the {name} has no text")
            limit = self._limits[name]
            if pair.instruction is not None and len(pair.instruction) > _CHARS_PER_TOKEN * limit:
                raise _RejectedError(
                    "instruction_too_long",
                    f"the {name}'s instruction has {len(pair.instruction)} characters; the limit is "
                    f"{_CHARS_PER_TOKEN * limit}, {_CHARS_PER_TOKEN} x its {limit} tokens",
                )
            roles = _PAIR_ROLES[name]
            texts.append((name, embedding_pieces(self.tokenizer, TextPair(pair.instruction, text), *roles)))
        return texts

    def _generative(self, record: Record) -> list[tuple[Record, list[tuple[str, list[Piece]]]]]:
        """The records that a line becomes, and the text of each."""
        if record.text is not None:
            if not record.text.strip():
                raise _RejectedError("empty_text", "the text is empty")
            return [(record, [("text", [(Role.TEXT, record.text)])])]
        if record.completion is not None:
            if not record.completion.strip():
                raise _RejectedError("empty_text", "the completion is empty")
            return [(record, [("completion", self.chat_format.completion(record.prompt or "", record.completion))])]
        answers = [message for message in record.messages if message.role == "assistant"]
        for number, answer in enumerate(answers, 1):
            if not answer.content.strip() and not (answer.more or {}).keys() & CALL_KEYS:
                raise _RejectedError("empty_text", f"answer {number} of the conversation is empty")
        try:
            chat_format = self.chat_format.of(record.messages, record.tools)
        except DataError as error:
            raise _RejectedError(BAD_LINE, str(error)) from error
        try:
            name = "turn" if chat_format.by_answer(record.messages) else "conversation"
            return [
                (replace(record, messages=list(messages)), [(name, chat_format.pieces(messages))])
                for messages in renderings(chat_format, record.messages, self.options.turns)
            ]
        except DataError as error:
            raise _RejectedError("template_refused", str(error)) from error

    def _rated(self, record: Record) -> list[tuple[str, list[Piece]]]:
        """The conversations of a preference record, each with all of its answers."""
        sides = {}
        for name, rated in record.rated:
            _, ((_, pieces),) = self._generative(rated)[-1]
            sides[name] = pieces
        return list(rate_pieces(sides).items())

    def _encode_batch(self, batch: _Batch) -> tuple[TokenBlock, np.ndarray, Counter[str]]:
        """Token block, record of each of its documents, and counters."""
        full = encode_units(self.tokenizer, batch.units)
        sizes = full.unit_tokens()
        limits = np.array([self._limits[name] for name in batch.names], dtype=np.int64)
        for unit, message in sorted(full.problems.items()):
            batch.reject(unit, "merged_answer", message)
        self._check_sizes(batch, full, sizes, limits)
        table = full.cut(limits)
        if self.options.over_long == "terminate":
            table = table.terminated(full)
        if self.options.kind is not RowKind.EMBEDDING:
            self._check_generative(batch, full, table, sizes)
        if self.options.kind is RowKind.PREFERENCE:
            self._check_pairs(batch, table, sizes > limits)
        pieces = self._split_over_long(batch, full, sizes) if self.options.over_long == "split" else {}
        owners = np.array(batch.owners, dtype=np.int64)
        kept = np.ones(len(batch.records), dtype=bool)
        kept[list(batch.rejected)] = False
        counters = Counter(
            f"truncated.{batch.names[unit]}"
            for unit in np.flatnonzero(kept[owners] & (sizes > limits)).tolist()
            if batch.owners[unit] not in pieces
        )
        kept[list(pieces)] = False
        table = table.select(kept[owners])
        spans = np.bincount(owners, weights=table.counts, minlength=len(kept)).astype(np.int32)
        tokens = TokenBlock(
            tokens=table.tokens.astype(self.dtype),
            lengths=table.lengths.astype(np.int32),
            documents=spans[kept],
            modes=table.roles.astype(np.int8),
        )
        documents = np.flatnonzero(kept)
        if pieces:
            records = sorted(pieces)
            parts = TokenBlock.from_records([part for record in records for part in pieces[record]], self.dtype)
            parents = np.repeat(records, [len(pieces[record]) for record in records])
            counters["split.records"], counters["split.pieces"] = len(records), len(parents)
            counters["truncated.conversation"] += batch.num_cut_pieces
            order = np.argsort(np.concatenate([documents, parents]), kind="stable")
            documents = np.concatenate([documents, parents])[order]
            tokens = _reorder(tokens, parts, order)
        if batch.num_unanswered:
            counters["unanswered"] = batch.num_unanswered
        return tokens, documents, counters

    def _check_sizes(self, batch: _Batch, full: SpanTable, sizes: np.ndarray, limits: np.ndarray) -> None:
        """Drop records with an instruction that leaves no room, or with a text that is too short or too long."""
        options = self.options
        if options.kind is RowKind.EMBEDDING:
            of_instruction = np.where(np.isin(full.roles, _INSTRUCTIONS), full.lengths, 0)
            heads = np.bincount(full.unit_of_span(), weights=of_instruction, minlength=len(sizes)).astype(np.int64)
            for unit in np.flatnonzero((heads >= limits) | (sizes == heads)).tolist():
                name = batch.names[unit]
                if heads[unit] >= limits[unit]:
                    message = (
                        f"instruction takes {heads[unit]} of its {limits[unit]} tokens and leaves none for the text"
                    )
                    batch.reject(unit, "instruction_too_long", f"the {name}'s {message}")
                else:
                    batch.reject(unit, "empty_text", f"the {name} has no text that the tokenizer knows")
        for unit in np.flatnonzero(sizes < options.min_tokens).tolist():
            message = f"the {batch.names[unit]} has {sizes[unit]} tokens; the least is {options.min_tokens}"
            batch.reject(unit, "too_short", message)
        if options.max_tokens is not None:
            for unit in np.flatnonzero(sizes > options.max_tokens).tolist():
                message = f"the {batch.names[unit]} has {sizes[unit]} tokens; the most is {options.max_tokens}"
                batch.reject(unit, "too_long", message)

    def _check_generative(self, batch: _Batch, full: SpanTable, table: SpanTable, sizes: np.ndarray) -> None:
        """Drop records that leave nothing to learn, and over-long ones where that is the policy."""
        limit = self.options.limits.generative
        if self.options.over_long == "drop":
            for unit in np.flatnonzero(sizes > limit).tolist():
                message = f"the {batch.names[unit]} has {sizes[unit]} tokens; the limit is {limit}"
                batch.reject(unit, "over_long", message)
        for unit in np.flatnonzero(sizes < 2).tolist():
            batch.reject(unit, "nothing_to_predict", "the text has one token, so no token to predict")
        left = table.counts
        if self.options.kind is RowKind.PREFERENCE:  # an earlier answer that is not rated may be left
            left = np.bincount(table.unit_of_span()[np.isin(table.roles, [*RATED.values()])], minlength=len(sizes))
        for unit in np.flatnonzero(left == 0).tolist():
            spans = full.spans(unit)
            learned = {Role.ANSWER} if self.options.kind is RowKind.GENERATIVE else ANSWERS - {Role.ANSWER}
            answer = next((place for place, (role, _) in enumerate(spans) if role in learned), len(spans))
            head = sum(len(ids) for _, ids in spans[:answer])
            what = {"text": "first user turn", "conversation": "first user turn", "completion": "prompt"}.get(
                batch.names[unit], "conversation before the answer"
            )
            room = "one" if self.options.over_long == "terminate" and head == limit - 1 else "none"
            message = f"the {what} takes {head} of {limit} tokens and leaves {room} for the answer"
            batch.reject(unit, "instruction_too_long", message)

    def _check_pairs(self, batch: _Batch, table: SpanTable, is_cut: np.ndarray) -> None:
        """Drop pairs whose conversations are the same tokens, which no loss tells apart."""
        ends = np.cumsum(table.unit_tokens())
        for unit in range(1, len(batch.units)):
            if batch.owners[unit - 1] != batch.owners[unit]:
                continue
            begin, middle, end = (int(ends[place]) if place >= 0 else 0 for place in (unit - 2, unit - 1, unit))
            if np.array_equal(table.tokens[begin:middle], table.tokens[middle:end]):
                when = (
                    f"cut to {self.options.limits.generative} tokens" if is_cut[unit - 1 : unit + 1].any() else "read"
                )
                batch.reject(unit, "equal_answers", f"chosen and rejected are the same tokens once they are {when}")

    def _split_over_long(self, batch: _Batch, full: SpanTable, sizes: np.ndarray) -> dict[int, list[list[Span]]]:
        """Pieces of the texts and conversations that are longer than the limit, by record."""
        limit = self.options.limits.generative
        pieces: dict[int, list[list[Span]]] = {}
        if self.options.kind is not RowKind.GENERATIVE:
            return pieces
        for unit in np.flatnonzero(sizes > limit).tolist():
            record = batch.owners[unit]
            if record in batch.rejected or batch.names[unit] in ("completion", "turn"):
                continue
            if batch.names[unit] == "text":
                ((role, ids),) = full.spans(unit)
                parts: list[list[Span]] = [[(role, ids[at : at + limit])] for at in range(0, len(ids), limit)]
                pieces[record] = [part for part in parts if len(part[0][1]) > 1]  # one token has none to predict
            else:
                parts = self._split_conversation(batch.records[record], limit)
                pieces[record] = [cut for part in parts if (cut := _cut_spans(part, limit))]
                if len(pieces[record]) > 1:
                    batch.num_cut_pieces += sum(_num_tokens(part) > limit for part in parts)
        return {record: parts for record, parts in pieces.items() if len(parts) > 1}

    def _split_conversation(self, record: Record, limit: int) -> list[list[Span]]:
        """Split a conversation into ones of as many turns as fit the limit, or of a single longer turn. Each begins
        with the system messages that precede the first turn."""
        messages = record.messages
        lead = list(messages[: _first_user(record)])
        ends = [place + 1 for place, message in enumerate(messages) if message.role == "assistant"]
        starts = [len(lead), *ends[:-1]]
        parts: list[list[Span]] = []
        tools, turn = record.tools, 0
        while turn < len(ends):
            stop = turn + 1
            best = self._conversation([*lead, *messages[starts[turn] : ends[turn]]], tools)
            while stop < len(ends) and _num_tokens(best) <= limit:
                longer = self._conversation([*lead, *messages[starts[turn] : ends[stop]]], tools)
                if _num_tokens(longer) > limit:
                    break
                best, stop = longer, stop + 1
            parts.append(best)
            turn = stop
        return parts

    def _conversation(self, messages: Sequence[Message], tools: Sequence[Any] | None) -> list[Span]:
        return encode_units(self.tokenizer, [self.chat_format.of(messages, tools).pieces(messages)]).spans(0)

    def _fingerprints(self, batch: _Batch, owners: np.ndarray) -> bytes:
        if not self.options.deduplicate:
            return b""
        result = []
        before = -1
        part = 0
        for owner in owners.tolist():
            part = part + 1 if owner == before else 0
            own = fingerprint(batch.records[owner], self.chat_format.read)
            if part:  # of a record that was split: the pieces of equal records are equal in turn
                own = hashlib.blake2b(own + part.to_bytes(8, "little"), digest_size=FINGERPRINT_BYTES).digest()
            result.append(own)
            before = owner
        return b"".join(result)


def _first_user(record: Record) -> int:
    return next(place for place, message in enumerate(record.messages) if message.role == "user")


def _num_tokens(spans: Sequence[Span]) -> int:
    return sum(len(ids) for _, ids in spans)


def _cut_spans(spans: Sequence[Span], limit: int) -> list[Span]:
    """The first tokens of a conversation, up to the last answer among them."""
    kept: list[Span] = []
    for role, ids in spans:
        kept.append((role, ids[:limit]))
        limit = max(0, limit - len(ids))
    while kept and not (kept[-1][0] is Role.ANSWER and kept[-1][1]):
        kept.pop()
    return kept


def _reorder(first: TokenBlock, second: TokenBlock, order: np.ndarray) -> TokenBlock:
    """The documents of two blocks, reordered."""
    documents = np.concatenate([first.documents, second.documents])
    lengths = np.concatenate([first.lengths, second.lengths])
    sequences = _ranges(documents, order)
    tokens = _ranges(lengths, sequences)
    assert first.modes is not None and second.modes is not None
    return TokenBlock(
        tokens=np.concatenate([first.tokens, second.tokens])[tokens],
        lengths=lengths[sequences],
        documents=documents[order],
        modes=np.concatenate([first.modes, second.modes])[sequences],
    )


def _ranges(counts: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Indices of the elements of consecutive groups of ``counts`` elements, with the groups reordered."""
    counts = counts.astype(np.int64)
    starts = np.cumsum(counts) - counts
    taken = counts[order]
    within = np.arange(int(taken.sum())) - np.repeat(np.cumsum(taken) - taken, taken)
    return np.repeat(starts[order], taken) + within
