"""JSONL records to an indexed file, with the reference's filters and an account of what they dropped."""

from __future__ import annotations

import json
import os
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Literal

import numpy as np

from megatron_grit.data.batch import RowKind
from megatron_grit.data.indexed import IndexedMeta, IndexedWriter
from megatron_grit.data.records import BadLine, Record, TextPair, read_records
from megatron_grit.data.roles import Role
from megatron_grit.data.templates import (
    TEMPLATE_NAME,
    Span,
    encode_chat,
    encode_embedding,
    encode_text,
    render,
    truncate_chat,
)
from megatron_grit.data.tokenizer import Tokenizer, load_tokenizer
from megatron_grit.errors import ConfigError, DataError

_CHARS_PER_TOKEN = 10
"""Texts are cut to this many characters for each token of the largest limit before they are tokenised."""
_QUANTILES = (0.0, 0.5, 0.9, 0.99, 1.0)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Tokens beyond which a text is cut off at its end, template included."""

    query: int = 256
    passage: int = 2048
    generative: int = 2048

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 2:
                raise ConfigError(f"the {name} limit is {value} tokens; it must be at least 2")

    @property
    def max_chars(self) -> int:
        """Characters beyond which a string of an embedding record is cut before it is tokenised."""
        return _CHARS_PER_TOKEN * max(self.query, self.passage, self.generative)


def read_texts(inputs: Sequence[str | Path]) -> Iterator[str]:
    """Every text of JSONL files in its template, to train a tokenizer on.

    Raises:
        DataError: a file or line that cannot be read.
    """
    for path in inputs:
        for item in read_records(path):
            if isinstance(item, BadLine):
                raise item.error
            yield from render(item)


class RejectedError(DataError):
    """A record that a filter drops. ``reason`` is its class in the report."""

    def __init__(self, reason: str, message: str, record: Record) -> None:
        super().__init__(message, path=record.path, line=record.line)
        self.reason = reason


@dataclass(kw_only=True)
class BuildReport:
    """What became of the input."""

    prefix: str
    kind: str = ""
    num_read: int = 0
    num_kept: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    """Records by the reason for which they were dropped."""
    truncated: dict[str, int] = field(default_factory=dict)
    """Texts that lost their end, by what they are."""
    token_quantiles: dict[str, dict[str, float]] = field(default_factory=dict)
    """Tokens, template included: count, mean and quantiles, by what the texts are."""
    num_tokens: int = 0
    num_supervised_tokens: int = 0

    def lines(self) -> list[str]:
        """The report as text."""
        num_dropped = self.num_read - self.num_kept
        lines = [f"{self.prefix}: {self.num_kept} {self.kind} records of {self.num_read} read, {num_dropped} dropped"]
        lines += [f"  dropped, {reason:22s} {count:10d}" for reason, count in sorted(self.dropped.items())]
        lines += [f"  truncated, {name:20s} {count:10d}" for name, count in sorted(self.truncated.items())]
        lines.append(f"  tokens {self.num_tokens}" + f", supervised {self.num_supervised_tokens}" * (not self._embeds))
        header = "".join(f"{name:>9s}" for name in ("texts", "mean", "min", "median", "90 %", "99 %", "max"))
        lines.append(f"  {'tokens of a':14s}{header}")
        for name, values in self.token_quantiles.items():
            count, mean, *quantiles = values.values()
            lines.append(f"  {name:14s}{count:9.0f}{mean:9.1f}" + "".join(f"{quantile:9.0f}" for quantile in quantiles))
        return lines

    @property
    def _embeds(self) -> bool:
        return self.kind == RowKind.EMBEDDING.value


class RecordEncoder:
    """Records to spans, with the filters of GRIT's training data.

    Args:
        tokenizer: the tokenizer.
        limits: token limits.
    """

    def __init__(self, tokenizer: Tokenizer, limits: Limits) -> None:
        self.tokenizer = tokenizer
        self.limits = limits
        self.lengths: dict[str, array[int]] = {}
        self.truncated: Counter[str] = Counter()

    def encode(self, record: Record) -> list[Span]:
        """Spans of a record; counts its texts.

        Raises:
            RejectedError: a filter drops the record.
            DataError: the tokenizer does not fit the template.
        """
        embeds = record.kind is RowKind.EMBEDDING
        texts = self._encode_texts(record) if embeds else [self._encode_generative(record)]
        for name, spans, was_cut in texts:  # only now is it known that the record is kept
            self.lengths.setdefault(name, array("q")).append(sum(len(ids) for _, ids in spans))
            self.truncated[name] += was_cut
        return [span for _, spans, _ in texts for span in spans]

    def _encode_texts(self, record: Record) -> list[tuple[str, list[Span], bool]]:
        if record.query is None:
            raise ValueError("an embedding record has a query")
        sides = [("query", record.query, self.limits.query, Role.QUERY_INSTRUCTION, Role.QUERY)]
        for pair in record.positives:
            sides.append(("positive", pair, self.limits.passage, Role.POSITIVE_INSTRUCTION, Role.POSITIVE))
        for pair in record.negatives:
            sides.append(("negative", pair, self.limits.passage, Role.NEGATIVE_INSTRUCTION, Role.NEGATIVE))
        texts = []
        for name, pair, limit, instruction_role, role in sides:
            head, tail = self._encode_pair(record, name, pair, limit)
            room = limit - len(head)
            texts.append((name, [(instruction_role, head), (role, tail[:room])], len(tail) > room))
        return texts

    def _encode_pair(self, record: Record, name: str, pair: TextPair, limit: int) -> tuple[list[int], list[int]]:
        instruction, text = pair.instruction, pair.text[: self.limits.max_chars]
        if not text.strip():
            raise RejectedError("empty_text", f"the {name} has no text", record)
        if instruction is not None and len(instruction) > _CHARS_PER_TOKEN * limit:
            raise RejectedError(
                "instruction_too_long",
                f"the {name}'s instruction has {len(instruction)} characters; the limit is {_CHARS_PER_TOKEN * limit}, "
                f"{_CHARS_PER_TOKEN} x its {limit} tokens",
                record,
            )
        head, tail = encode_embedding(self.tokenizer, text, instruction)
        if len(head) >= limit:
            raise RejectedError(
                "instruction_too_long",
                f"the {name}'s instruction takes {len(head)} of its {limit} tokens and leaves none for the text",
                record,
            )
        if not tail:
            raise RejectedError("empty_text", f"the {name} has no text that the tokenizer knows", record)
        return head, tail

    def _encode_generative(self, record: Record) -> tuple[str, list[Span], bool]:
        limit = self.limits.generative
        if record.text is not None:
            if not record.text.strip():
                raise RejectedError("empty_text", "the text is empty", record)
            full = encode_text(self.tokenizer, record.text)
            spans = [(role, ids[:limit]) for role, ids in full]
            if len(spans[0][1]) < 2:
                raise RejectedError("nothing_to_predict", "the text has one token, so no token to predict", record)
            return "text", spans, len(full[0][1]) > limit
        for number, turn in enumerate(record.turns[1::2]):
            if not turn.strip():
                raise RejectedError("empty_text", f"answer {number + 1} of the conversation is empty", record)
        full = encode_chat(self.tokenizer, record.turns)
        spans = truncate_chat(full, limit)
        if not spans:
            raise RejectedError(
                "instruction_too_long",
                f"the first user turn takes {len(full[0][1])} of {limit} tokens and leaves none for the answer",
                record,
            )
        return "conversation", spans, sum(len(ids) for _, ids in full) > limit

    def quantiles(self) -> dict[str, dict[str, float]]:
        """Token counts of the texts so far: count, mean and quantiles for each kind of text."""
        table = {}
        for name, values in self.lengths.items():
            numbers = np.frombuffer(values, dtype=np.int64)
            quantiles = np.quantile(numbers, _QUANTILES, method="inverted_cdf").tolist()
            table[name] = {"count": len(numbers), "mean": float(numbers.mean())}
            table[name] |= {
                f"p{100 * quantile:g}": value for quantile, value in zip(_QUANTILES, quantiles, strict=True)
            }
        return table


def build_grit(
    inputs: Sequence[str | Path],
    output_prefix: str | Path,
    tokenizer_path: str | Path,
    limits: Limits | None = None,
    *,
    on_error: Literal["stop", "skip"] = "stop",
    on_filtered: Literal["drop", "stop"] = "drop",
    overwrite: bool = False,
    progress: bool = False,
) -> BuildReport:
    """Write ``<output_prefix>.bin``, ``.idx``, ``.json``, ``.report.json`` and, if any line was dropped,
    ``.rejected.jsonl`` with the file, line and reason of each.

    Args:
        inputs: JSONL files, read in this order; all of one kind.
        output_prefix: path without extension.
        tokenizer_path: see :func:`~megatron_grit.data.tokenizer.load_tokenizer`.
        limits: token limits.
        on_error: what to do with a line that is not a record.
        on_filtered: what to do with a record that a filter drops (empty text, instruction too long).
        overwrite: replace what is there.
        progress: show a bar on stderr.

    Raises:
        DataError: an input that cannot be read, a bad line, records of both kinds, or nothing kept. No file has been
            written then.
    """
    if not inputs:
        raise DataError("no input files")
    for path in map(Path, inputs):
        if not path.is_file():
            raise DataError("no such input file", path=path)
    tokenizer = load_tokenizer(tokenizer_path)
    limits = limits or Limits()
    encoder = RecordEncoder(tokenizer, limits)
    report = BuildReport(prefix=str(output_prefix))
    rejected = _RejectedFile(Path(f"{os.fspath(output_prefix)}.rejected.jsonl"))
    stops = {"bad_line": on_error == "stop"}
    writer: IndexedWriter | None = None
    with ExitStack() as stack:
        stack.callback(rejected.discard)
        for item in _read_all(inputs, progress):
            report.num_read += 1
            try:
                if isinstance(item, BadLine):
                    raise item.error
                if writer is None:
                    report.kind = item.kind.value
                    writer = IndexedWriter(output_prefix, item.kind, tokenizer.vocab_size, overwrite=overwrite)
                    stack.enter_context(writer)
                _check_kind(item, writer.kind)
                spans = encoder.encode(item)
            except DataError as error:
                reason = _reason(item, error)
                if reason is None or stops.get(reason, on_filtered == "stop"):
                    raise
                rejected.add(reason, error)
                continue
            writer.add(spans)
        report.dropped = dict(rejected.counts)
        report.num_kept = report.num_read - sum(rejected.counts.values())
        if writer is None or not report.num_kept:
            raise _nothing_kept(inputs, rejected)
        meta = writer.finalize(
            tokenizer_fingerprint=tokenizer.fingerprint, template=TEMPLATE_NAME, limits=asdict(limits)
        )
        _complete(report, encoder, meta)
        rejected.finalize()
        _write_json(Path(f"{os.fspath(output_prefix)}.report.json"), asdict(report))
    return report


def _read_all(inputs: Sequence[str | Path], progress: bool) -> Iterator[Record | BadLine]:
    from tqdm import tqdm

    num_bytes = sum(Path(path).stat().st_size for path in inputs)
    with tqdm(total=num_bytes, unit="B", unit_scale=True, desc="build_grit", disable=None if progress else True) as bar:
        for path in inputs:
            yield from read_records(path, on_bytes=bar.update)


def _reason(item: Record | BadLine, error: DataError) -> str | None:
    """Class of a dropped line, or None for an error that dropping the line does not repair."""
    if isinstance(item, BadLine):
        return "bad_line"
    return error.reason if isinstance(error, RejectedError) else None


def _check_kind(record: Record, kind: RowKind) -> None:
    if record.kind is not kind:
        raise DataError(
            f"a record of kind {record.kind.value} after records of kind {kind.value}; "
            "put the two kinds into separate files and build each with a prefix of its own",
            path=record.path,
            line=record.line,
        )


def _nothing_kept(inputs: Sequence[str | Path], rejected: _RejectedFile) -> DataError:
    if rejected.first is None:
        return DataError("no records in the input", path=inputs[0])
    reason, count = rejected.counts.most_common(1)[0]
    total = sum(rejected.counts.values())
    return DataError(
        f"nothing is left: {count} of {total} records were dropped as {reason}; the first: {rejected.first}"
    )


def _complete(report: BuildReport, encoder: RecordEncoder, meta: IndexedMeta) -> None:
    report.truncated = {name: count for name, count in encoder.truncated.items() if count}
    report.token_quantiles = encoder.quantiles()
    report.num_tokens = meta.num_tokens
    report.num_supervised_tokens = meta.num_supervised_tokens if meta.kind == RowKind.GENERATIVE.value else 0


def _write_json(path: Path, value: object) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)


class _RejectedFile:
    """The lines that were dropped, one JSON object each. No file appears where there are none."""

    def __init__(self, path: Path) -> None:
        self.counts: Counter[str] = Counter()
        self.first: DataError | None = None
        self._path = path
        self._temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        self._file: IO[str] | None = None

    def add(self, reason: str, error: DataError) -> None:
        self.counts[reason] += 1
        self.first = self.first or error
        if self._file is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._temporary.open("w", encoding="utf-8")
        entry = {"path": str(error.path), "line": error.line, "reason": reason, "message": str(error)}
        self._file.write(json.dumps(entry, ensure_ascii=False) + "\n")

    def finalize(self) -> None:
        if self._file is None:
            self._path.unlink(missing_ok=True)  # of an earlier build
            return
        self._file.close()
        os.replace(self._temporary, self._path)

    def discard(self) -> None:
        if self._file is not None:
            self._file.close()
            self._temporary.unlink(missing_ok=True)
