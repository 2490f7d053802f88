"""Writes indexed files as streams that are appended to block by block in constant memory; a killed write resumes.

The bytes are those that ``megatron.core.datasets.indexed_dataset.IndexedDatasetBuilder`` writes for the same tokens;
tests/unit/data/indexed/test_indexed_writer.py compares. That builder keeps the whole index in Python lists and cannot
resume, which is why it is not used.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from megatron_grit.data.indexed.reader import (
    DOCUMENTS,
    DTYPE_OF_CODE,
    HEADER,
    MAGIC,
    IndexedFile,
    IndexedMeta,
    file_paths,
    read_meta,
    token_dtype,
)
from megatron_grit.data.indexed.records import checksums
from megatron_grit.data.indexed.roles import POOLED, SUPERVISED, Role, RowKind, check_grammar
from megatron_grit.errors import DataError
from megatron_grit.store.files import replacing, write_json

_CODE_OF_DTYPE = {np.dtype(name): code for code, name in DTYPE_OF_CODE.items()}
_CHUNK = 1 << 20
"""Sequences or documents that are held in memory at once while the index is written."""

Span = tuple[Role, Sequence[int]]


@dataclass(frozen=True, kw_only=True)
class TokenBlock:
    """Some documents as arrays."""

    tokens: np.ndarray
    """Token type [num_tokens]."""
    lengths: np.ndarray
    """int32 [num_sequences]: tokens of each sequence."""
    documents: np.ndarray
    """int32 [num_documents]: sequences of each document."""
    modes: np.ndarray | None = None
    """int8 [num_sequences]: role of each sequence. None for plain documents."""

    @staticmethod
    def from_records(records: Sequence[Sequence[Span]], dtype: Any) -> TokenBlock:
        """Block of records, each a list of (role, ids). Empty spans are left out."""
        spans = [[(role, ids) for role, ids in record if len(ids)] for record in records]
        flat = [span for record in spans for span in record]
        return TokenBlock(
            tokens=np.concatenate([np.asarray(ids, dtype=dtype) for _, ids in flat] or [np.empty(0, dtype=dtype)]),
            lengths=np.array([len(ids) for _, ids in flat], dtype=np.int32),
            documents=np.array([len(record) for record in spans], dtype=np.int32),
            modes=np.array([int(role) for role, _ in flat], dtype=np.int8),
        )

    def select(self, kept: np.ndarray) -> TokenBlock:
        """The documents for which ``kept``, bool [num_documents], is true."""
        if kept.all():
            return self
        sequences = np.repeat(kept, self.documents)
        return TokenBlock(
            tokens=self.tokens[np.repeat(sequences, self.lengths)],
            lengths=self.lengths[sequences],
            documents=self.documents[kept],
            modes=None if self.modes is None else self.modes[sequences],
        )


@dataclass(frozen=True, kw_only=True)
class IndexedFacts:
    """What the ``.json`` says that the tokens do not."""

    kind: str
    tokenizer_fingerprint: str
    vocab_size: int
    template: str = ""
    limits: dict[str, int] = field(default_factory=dict)
    template_source: str | dict[str, Any] | None = None
    template_rules: int = 1
    template_turns: str | None = None
    template_date: str | None = None


class IndexedStream:
    """Blocks appended to files in a working folder; then the three files of a prefix.

    After a kill, :meth:`rewind` to a position that :meth:`position` returned and append what came after it. A kill
    during :meth:`finalize` is mended by calling it again.

    Args:
        folder: working folder, on the file system of the output; shared by the streams of one build.
        name: name of this stream in the folder.
        dtype: type of the tokens.
        with_modes: whether blocks carry modes.
    """

    def __init__(self, folder: Path, name: str, dtype: Any, *, with_modes: bool) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.dtype = np.dtype(dtype)
        self._with_modes = with_modes
        kinds = ["bin", "lengths", "documents"] + ["modes"] * with_modes
        self._paths = {kind: folder / f"{name}.{kind}" for kind in kinds}
        self._ready = folder / f"{name}.ready.json"
        self._staged = {kind: folder / f"{name}.staged.{kind}" for kind in ("json", "idx")}
        self._files: dict[str, BinaryIO] = {}
        if not self._ready.exists():
            self._files = {kind: path.open("ab") for kind, path in self._paths.items()}

    def append(self, block: TokenBlock) -> None:
        """Append a block.

        Raises:
            ValueError: tokens of another type, or modes where there are none.
        """
        if block.tokens.dtype != self.dtype or (block.modes is not None) != self._with_modes:
            raise ValueError(f"a block of {block.tokens.dtype} does not fit this stream of {self.dtype}")
        self._files["bin"].write(np.ascontiguousarray(block.tokens).data)
        self._files["lengths"].write(np.ascontiguousarray(block.lengths, dtype="<i4").data)
        self._files["documents"].write(np.ascontiguousarray(block.documents, dtype="<i4").data)
        if block.modes is not None:
            self._files["modes"].write(np.ascontiguousarray(block.modes, dtype=np.int8).data)

    def extend(self, source: IndexedFile) -> None:
        """Append all of an indexed file.

        Raises:
            DataError: it holds tokens of another type, has modes where this has none, or is damaged.
        """
        if source.dtype != self.dtype or (source.modes is not None) != self._with_modes:
            raise DataError(
                f"holds {source.dtype} tokens {'with' if source.modes is not None else 'without'} modes, unlike the "
                "files before it; only files of one kind and tokenizer can be joined",
                path=source.idx_path,
                byte=17,
            )
        source.check_index()
        self._files["bin"].flush()
        with source.bin_path.open("rb") as tokens:
            shutil.copyfileobj(tokens, self._files["bin"], 1 << 24)
        for start in range(0, source.num_sequences, _CHUNK):
            self._files["lengths"].write(source.lengths[start : start + _CHUNK].tobytes())
            if source.modes is not None:
                self._files["modes"].write(source.modes[start : start + _CHUNK].tobytes())
        for start in range(0, source.num_documents, _CHUNK):
            counts = np.diff(source.documents[start : start + _CHUNK + 1])
            self._files["documents"].write(counts.astype("<i4").tobytes())

    def position(self) -> dict[str, int]:
        """Flush to disk and return the size of each file."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        return {kind: path.stat().st_size for kind, path in self._paths.items() if path.exists()}

    def rewind(self, position: dict[str, int]) -> None:
        """Cut the files back to ``position``; {} empties them. Nothing happens once :meth:`finalize` has begun.

        Raises:
            DataError: a file is shorter than that.
        """
        if self._ready.exists():
            return
        for kind, path in self._paths.items():
            size, wanted = path.stat().st_size, position.get(kind, 0)
            if size < wanted:
                raise DataError(f"is shorter than the {wanted} bytes that were written", path=path, byte=size)
            os.truncate(path, wanted)

    def num_documents(self) -> int:
        """Documents so far."""
        self._files["documents"].flush()
        return self._paths["documents"].stat().st_size // 4

    def finalize(
        self,
        prefix: str | Path,
        facts: Callable[[], IndexedFacts] | None,
        *,
        overwrite: bool = False,
        checksum: bool = True,
    ) -> IndexedMeta | None:
        """Write the index and the metadata, and give the files their names, the ``.idx`` last.

        Args:
            prefix: path without extension.
            facts: called once all documents are there. None: no ``.json``.
            overwrite: replace files that are there.
            checksum: write checksums into the ``.json``.

        Returns:
            What the ``.json`` says.

        Raises:
            DataError: no document was appended, roles that make no record, or files that exist.
        """
        if not self._ready.exists():
            refuse_existing(prefix, overwrite)
            if not self.num_documents():
                raise DataError(f"no records for {prefix}")
            self._write_index()
            if facts is not None:
                meta = self._describe(facts(), checksum)
                with replacing(self._staged["json"]) as file:
                    file.write(meta.to_json())
            write_json(self._ready, {})
        self.close()
        # From here on a second call does the same, until the last of the three has its name.
        final_bin, final_idx, final_json = file_paths(prefix)
        moves = ((self._paths["bin"], final_bin), (self._staged["json"], final_json), (self._staged["idx"], final_idx))
        if self._staged["idx"].exists():
            final_idx.unlink(missing_ok=True)  # no index, so nothing to trust, until the last move
        for source, target in moves:
            if source.exists():
                os.replace(source, target)
        self.discard()
        return None if facts is None else read_meta(prefix)

    def _write_index(self) -> None:
        lengths, documents = self._paths["lengths"], self._paths["documents"]
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        num_sequences = lengths.stat().st_size // 4
        with self._staged["idx"].open("wb") as index:
            code = _CODE_OF_DTYPE[self.dtype]
            index.write(HEADER.pack(MAGIC, 1, code, num_sequences, self.num_documents() + 1))
            with lengths.open("rb") as source:
                shutil.copyfileobj(source, index, 1 << 22)
            start = 0
            for counts in _chunks(lengths, "<i4"):
                ends = np.cumsum(counts, dtype=np.int64) * self.dtype.itemsize + start
                index.write((ends - counts.astype(np.int64) * self.dtype.itemsize).astype("<i8").tobytes())
                start = int(ends[-1])
            index.write(np.zeros(1, dtype="<i8").tobytes())
            start = 0
            for counts in _chunks(documents, "<i4"):
                ends = np.cumsum(counts, dtype=np.int64) + start
                index.write(ends.astype("<i8").tobytes())
                start = int(ends[-1])
            if self._with_modes:
                with self._paths["modes"].open("rb") as source:
                    shutil.copyfileobj(source, index, 1 << 22)
            index.flush()
            os.fsync(index.fileno())

    def _describe(self, facts: IndexedFacts, checksum: bool) -> IndexedMeta:
        bin_path, idx_path = self._paths["bin"], self._staged["idx"]
        digests = (checksums(bin_path), checksums(idx_path)[0]) if checksum else (("", []), "")
        return describe_files(facts, self._blocks(), bin_path, idx_path, digests)

    def _blocks(self) -> Iterator[TokenBlock]:
        """The documents so far, without their tokens."""
        start = 0
        with self._paths["lengths"].open("rb") as lengths:
            for documents in _chunks(self._paths["documents"], "<i4"):
                count = int(documents.sum())
                modes = None
                if self._with_modes:
                    modes = np.fromfile(self._paths["modes"], dtype=np.int8, count=count, offset=start)
                start += count
                content = np.frombuffer(lengths.read(4 * count), dtype="<i4")
                yield TokenBlock(tokens=np.empty(0), lengths=content, documents=documents, modes=modes)

    def close(self) -> None:
        """Close the files and leave them where they are."""
        for file in self._files.values():
            file.close()

    def discard(self) -> None:
        """Remove the stream's files from the working folder."""
        self.close()
        for path in (*self._paths.values(), *self._staged.values(), self._ready):
            path.unlink(missing_ok=True)


def describe_files(
    facts: IndexedFacts,
    blocks: Iterable[TokenBlock],
    bin_path: Path,
    idx_path: Path,
    digests: tuple[tuple[str, list[int]], str],
) -> IndexedMeta:
    """What the ``.json`` says of a ``.bin`` and an ``.idx``.

    Args:
        facts: what the tokens do not say.
        blocks: all documents, in order; their tokens are not looked at.
        bin_path: the tokens.
        idx_path: the index.
        digests: :func:`~megatron_grit.data.indexed.records.checksums` of the first, and the SHA-256 of the second.

    Raises:
        DataError: roles that make no record.
    """
    summary = _Summary(facts.kind)
    for block in blocks:
        summary.add(block)
    (bin_sha256, bin_crc32), idx_sha256 = digests
    return IndexedMeta(
        kind=facts.kind,
        num_records=summary.num_records,
        num_tokens=summary.num_tokens,
        num_supervised_tokens=summary.num_supervised,
        longest_segment_tokens=summary.longest,
        longest_segment_record=summary.longest_record,
        min_negatives=summary.min_negatives or 0,
        max_negatives=summary.max_negatives,
        tokenizer_fingerprint=facts.tokenizer_fingerprint,
        vocab_size=facts.vocab_size,
        template=facts.template,
        limits=facts.limits,
        bin_bytes=bin_path.stat().st_size,
        idx_bytes=idx_path.stat().st_size,
        bin_sha256=bin_sha256,
        idx_sha256=idx_sha256,
        bin_crc32=bin_crc32,
        template_source=facts.template_source,
        template_rules=facts.template_rules,
        template_turns=facts.template_turns,
        template_date=facts.template_date,
        num_skipped=summary.num_skipped,
    )


class _Summary:
    """Counts of an indexed file, added up block by block."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.num_records = self.num_tokens = self.num_supervised = self.num_skipped = 0
        self.longest = self.longest_record = 0
        self.min_negatives: int | None = None
        self.max_negatives = 0
        self._known: set[bytes] = set()

    def add(self, block: TokenBlock) -> None:
        lengths, first = block.lengths.astype(np.int64), self.num_records
        starts = np.cumsum(block.documents, dtype=np.int64) - block.documents
        tokens = _sums(lengths, block.documents)
        self.num_records += len(block.documents)
        self.num_tokens += int(lengths.sum())
        if self.kind == DOCUMENTS:
            self.num_supervised += int(np.maximum(tokens - 1, 0).sum())
            self.num_skipped += int((tokens < 2).sum())
            return self._longest_of(tokens, np.arange(first, self.num_records))
        if block.modes is None:
            raise ValueError(f"a file of kind {self.kind} needs modes")
        self._check_roles(block, starts, first)
        if self.kind != RowKind.EMBEDDING.value:
            labels = _sums(lengths * _SUPERVISED[block.modes], block.documents) - (block.modes[starts] == Role.TEXT)
            self.num_supervised += int(labels.sum())
            self.min_negatives = 0
            return self._longest_of(tokens, np.arange(first, self.num_records))
        negatives = _sums((block.modes == Role.NEGATIVE).astype(np.int64), block.documents)
        low = int(negatives.min())
        self.min_negatives = low if self.min_negatives is None else min(low, self.min_negatives)
        self.max_negatives = max(self.max_negatives, int(negatives.max()))
        ends = np.flatnonzero(_POOLED[block.modes])  # every segment ends with a pooled span
        segments = np.add.reduceat(lengths, np.concatenate(([0], ends[:-1] + 1)))
        self._longest_of(segments, np.searchsorted(starts, ends, side="right") - 1 + first)

    def _longest_of(self, lengths: np.ndarray, records: np.ndarray) -> None:
        place = int(lengths.argmax())
        if lengths[place] > self.longest:
            self.longest, self.longest_record = int(lengths[place]), int(records[place])

    def _check_roles(self, block: TokenBlock, starts: np.ndarray, first: int) -> None:
        content = block.modes.tobytes() if block.modes is not None else b""
        for number, (start, count) in enumerate(zip(starts.tolist(), block.documents.tolist(), strict=True)):
            word = content[start : start + count]
            if word not in self._known:
                check_grammar(np.frombuffer(word, dtype=np.int8).tolist(), RowKind(self.kind), str(first + number))
                self._known.add(word)


_SUPERVISED = np.array([role in SUPERVISED for role in Role], dtype=np.int64)
_POOLED = np.array([role in POOLED for role in Role])


def _sums(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Sum of each run of ``counts`` values; 0 for an empty run."""
    ends = np.concatenate(([0], np.cumsum(values, dtype=np.int64)))
    stops = np.cumsum(counts, dtype=np.int64)
    return ends[stops] - ends[stops - counts]


def _chunks(path: Path, dtype: str) -> Iterator[np.ndarray]:
    """A file of numbers, a part at a time."""
    with path.open("rb") as file:
        while content := file.read(_CHUNK * np.dtype(dtype).itemsize):
            yield np.frombuffer(content, dtype=dtype)


def refuse_existing(prefix: str | Path, overwrite: bool) -> None:
    """Raise where files of this prefix exist and may not be replaced.

    Raises:
        DataError: they do.
    """
    existing = next((path for path in file_paths(prefix) if path.exists()), None)
    if existing is not None and not overwrite:
        raise DataError("exists already; choose another prefix or overwrite it (--overwrite)", path=existing)


class IndexedWriter:
    """Writes records one at a time. They appear under ``prefix`` when :meth:`finalize` is through, or never.

    For jobs of one process; large ones go through :mod:`megatron_grit.data.builders.block_build`.

    Args:
        prefix: path without extension.
        kind: kind of every record.
        vocab_size: decides the type of the tokens.
        overwrite: replace files that are there.

    Raises:
        DataError: files of this prefix exist and ``overwrite`` is false.
    """

    def __init__(self, prefix: str | Path, kind: RowKind, vocab_size: int, *, overwrite: bool = False) -> None:
        self.prefix, self.kind = Path(prefix), kind
        self._overwrite, self._vocab_size = overwrite, vocab_size
        refuse_existing(prefix, overwrite)
        self.folder = self.prefix.with_name(f".{self.prefix.name}.{os.getpid()}.tmp")
        """Of what is not whole yet; it goes with the writer."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self._stream = IndexedStream(self.folder, "records", token_dtype(vocab_size), with_modes=True)
        self._num_records = 0

    def add(self, spans: Sequence[Span]) -> None:
        """Append a record. Empty spans are left out.

        Raises:
            DataError: roles that make no record of this kind.
        """
        block = TokenBlock.from_records([spans], self._stream.dtype)
        roles = [] if block.modes is None else block.modes.tolist()
        check_grammar(roles, self.kind, f"{self.prefix}#{self._num_records}")
        self._stream.append(block)
        self._num_records += 1

    def finalize(self, *, tokenizer_fingerprint: str, template: str, limits: dict[str, int]) -> IndexedMeta:
        """Write the index and the metadata and give all three files their names, the ``.idx`` last.

        Raises:
            DataError: no record was added.
        """
        facts = IndexedFacts(
            kind=self.kind.value,
            tokenizer_fingerprint=tokenizer_fingerprint,
            vocab_size=self._vocab_size,
            template=template,
            limits=limits,
        )
        meta = self._stream.finalize(self.prefix, lambda: facts, overwrite=self._overwrite)
        assert meta is not None
        return meta

    def discard(self) -> None:
        """Remove the temporary files."""
        self._stream.discard()
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.discard()


def write_texts(prefix: Path, texts: Iterable[Sequence[int]], vocab_size: int, tokenizer_fingerprint: str) -> None:
    """Write an indexed file of plain texts.

    Args:
        prefix: path without extension; where a file is, it is refused.
        texts: tokens of each document, its end-of-document token included.
        vocab_size: of the tokenizer.
        tokenizer_fingerprint: of the tokenizer.

    Raises:
        DataError, OutputError: as for :class:`IndexedWriter`.
    """
    with IndexedWriter(prefix, RowKind.GENERATIVE, vocab_size) as writer:
        for tokens in texts:
            writer.add([(Role.TEXT, tokens)])
        writer.finalize(tokenizer_fingerprint=tokenizer_fingerprint, template="none", limits={})
