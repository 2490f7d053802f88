"""Indexed files: Megatron's ``.bin`` and ``.idx`` with a role for every sequence, and a ``.json`` about them.

A record is a document, its spans are the document's sequences, and a sequence's mode byte is its
:class:`~megatron_grit.data.roles.Role`. Any tool that reads Megatron's multimodal indexed datasets reads these.
docs/data_formats.md has the bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from megatron_grit.data.batch import RowKind
from megatron_grit.data.roles import Role, check_grammar, split_segments
from megatron_grit.errors import DataError

FORMAT_NAME = "megatron_grit.indexed"
FORMAT_VERSION = 1

_HEADER = struct.Struct("<9sQBQQ")  # magic, version, code of the token type, sequences, documents + 1
_MAGIC = b"MMIDIDX\x00\x00"
_ITEMSIZE_OF_CODE = {4: 4, 8: 2}  # the engine's codes of int32 and uint16
_BYTES_PER_SEQUENCE = 4 + 8 + 1  # length, byte offset, role
_BYTES_PER_DOCUMENT = 8


def token_dtype(vocab_size: int) -> type[np.uint16] | type[np.int32]:
    """Type of the tokens in the ``.bin``: 2 bytes for a vocabulary under 65,500, as Megatron has it, else 4."""
    return np.uint16 if vocab_size < 65500 else np.int32


@dataclass(frozen=True, kw_only=True)
class IndexedMeta:
    """The ``.json`` beside an indexed file."""

    kind: str
    """"embedding" or "generative"."""
    num_records: int
    num_tokens: int
    num_supervised_tokens: int
    """Tokens that are labels of the next-token loss. 0 for embedding records."""
    longest_segment_tokens: int
    """Longest stretch that attends to itself: a query, passage, text or conversation."""
    longest_segment_record: int
    min_negatives: int
    """Fewest negatives of any record. 0 for generative records."""
    max_negatives: int
    tokenizer_fingerprint: str
    vocab_size: int
    template: str
    limits: dict[str, int]
    """Tokens beyond which texts were cut."""
    bin_bytes: int
    bin_sha256: str
    idx_bytes: int
    format: str = FORMAT_NAME
    version: int = FORMAT_VERSION


def file_paths(prefix: str | Path) -> tuple[Path, Path, Path]:
    """The ``.bin``, ``.idx`` and ``.json`` of a prefix."""
    name = os.fspath(prefix)
    return Path(f"{name}.bin"), Path(f"{name}.idx"), Path(f"{name}.json")


class IndexedWriter:
    """Writes records under temporary names; they appear under ``prefix`` when :meth:`finalize` is through, or never.

    Args:
        prefix: path without extension.
        kind: kind of every record.
        vocab_size: decides the type of the tokens.
        overwrite: replace files that are there.

    Raises:
        DataError: files of this prefix exist and ``overwrite`` is false.
    """

    def __init__(self, prefix: str | Path, kind: RowKind, vocab_size: int, *, overwrite: bool = False) -> None:
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

        self.prefix = Path(prefix)
        self.kind = kind
        self._vocab_size = vocab_size
        self._dtype = token_dtype(vocab_size)
        existing = next((path for path in file_paths(prefix) if path.exists()), None)
        if existing is not None and not overwrite:
            raise DataError("exists already; choose another prefix or overwrite it", path=existing)
        self.prefix.parent.mkdir(parents=True, exist_ok=True)
        self._temporary = self.prefix.with_name(f".{self.prefix.name}.{os.getpid()}.tmp")
        self._builder = IndexedDatasetBuilder(str(file_paths(self._temporary)[0]), dtype=self._dtype, multimodal=True)
        self._digest = hashlib.sha256()
        self._num_tokens = self._num_supervised = self._num_records = 0
        self._longest = (0, 0)
        self._negatives: tuple[int, int] | None = None

    def add(self, spans: Sequence[tuple[Role, Sequence[int]]]) -> None:
        """Append a record. Empty spans are left out.

        Raises:
            DataError: roles that make no record of this kind.
        """
        spans = [(role, ids) for role, ids in spans if len(ids)]
        roles = [role for role, _ in spans]
        lengths = [len(ids) for _, ids in spans]
        check_grammar(roles, self.kind, f"{self.prefix}#{self._num_records}")
        tokens = np.concatenate([np.asarray(ids, dtype=self._dtype) for _, ids in spans])
        self._builder.add_document(tokens, lengths, [int(role) for role in roles])
        self._digest.update(tokens.tobytes())
        segments = segment_lengths(roles, lengths)
        self._longest = max(self._longest, (max(segments), -self._num_records))
        self._num_supervised += num_labels(roles, lengths)
        negatives = roles.count(Role.NEGATIVE)
        low, high = self._negatives or (negatives, negatives)
        self._negatives = (min(low, negatives), max(high, negatives))
        self._num_tokens += len(tokens)
        self._num_records += 1

    def finalize(self, *, tokenizer_fingerprint: str, template: str, limits: dict[str, int]) -> IndexedMeta:
        """Write the index and the metadata and give all three files their names, the ``.idx`` last.

        Raises:
            DataError: no record was added.
        """
        if not self._num_records or self._negatives is None:
            raise DataError(f"no records for {self.prefix}")
        temporary_bin, temporary_idx, temporary_json = file_paths(self._temporary)
        self._builder.finalize(str(temporary_idx))
        meta = IndexedMeta(
            kind=self.kind.value,
            num_records=self._num_records,
            num_tokens=self._num_tokens,
            num_supervised_tokens=self._num_supervised,
            longest_segment_tokens=self._longest[0],
            longest_segment_record=-self._longest[1],
            min_negatives=self._negatives[0],
            max_negatives=self._negatives[1],
            tokenizer_fingerprint=tokenizer_fingerprint,
            vocab_size=self._vocab_size,
            template=template,
            limits=limits,
            bin_bytes=temporary_bin.stat().st_size,
            bin_sha256=self._digest.hexdigest(),
            idx_bytes=temporary_idx.stat().st_size,
        )
        temporary_json.write_text(json.dumps(asdict(meta), indent=2) + "\n", encoding="utf-8")
        final_bin, final_idx, final_json = file_paths(self.prefix)
        final_idx.unlink(missing_ok=True)  # from here to the last line there is no index: a crash leaves none to trust
        os.replace(temporary_bin, final_bin)
        os.replace(temporary_json, final_json)
        os.replace(temporary_idx, final_idx)
        return meta

    def discard(self) -> None:
        """Remove the temporary files. Nothing happens after :meth:`finalize`."""
        self._builder.data_file.close()
        for path in file_paths(self._temporary):
            path.unlink(missing_ok=True)

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.discard()


def segment_lengths(roles: Sequence[int], lengths: Sequence[int]) -> list[int]:
    """Tokens of each segment: of an embedding record its query and passages, of a generative one all of it."""
    segments = split_segments(roles)
    return [int(sum(lengths[start:stop])) for start, stop in segments] if segments else [int(sum(lengths))]


def num_labels(roles: Sequence[int], lengths: Sequence[int]) -> int:
    """Tokens of a record that are labels: those of TEXT and ANSWER spans, but not the record's first token."""
    labels = sum(int(length) for role, length in zip(roles, lengths, strict=True) if role in (Role.TEXT, Role.ANSWER))
    return labels - 1 if roles[0] == Role.TEXT else labels


class IndexedRecords:
    """Random access to the records of an indexed file, memory-mapped.

    Args:
        prefix: path without extension.

    Raises:
        DataError: a file is missing, is not of this format, or is not as long as the index says; with the byte
            where it goes wrong.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = str(prefix)
        self.meta = read_meta(prefix)
        self.kind = RowKind(self.meta.kind)
        _check_files(prefix, self.meta)
        from megatron.core.datasets.indexed_dataset import IndexedDataset

        self._dataset = IndexedDataset(self.prefix, multimodal=True)
        index = self._dataset.index
        # These are views of the mapped index: they live no longer than self._dataset and must not leave this object.
        self._lengths = index.sequence_lengths
        self._roles = index.sequence_modes
        self._documents = index.document_indices

    def __len__(self) -> int:
        return len(self._documents) - 1

    def name(self, index: int) -> str:
        """Name of a record in messages: "prefix#index"."""
        return f"{self.prefix}#{index}"

    def lengths(self) -> np.ndarray:
        """Tokens of each record: int64 [num_records]."""
        ends = np.concatenate(([0], np.cumsum(self._lengths, dtype=np.int64)))
        return np.diff(ends[self._documents])

    def spans(self, index: int) -> tuple[list[int], list[int]]:
        """Roles and lengths of a record's spans. No token is read.

        Raises:
            DataError: roles that make no record of this file's kind.
            IndexError: no such record.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        start, stop = int(self._documents[index]), int(self._documents[index + 1])
        roles = self._roles[start:stop].tolist()
        check_grammar(roles, self.kind, self.name(index))
        return roles, self._lengths[start:stop].tolist()

    def get(self, index: int) -> list[tuple[Role, np.ndarray]]:
        """Spans of a record: role and tokens, int64.

        Raises:
            DataError: roles that make no record of this file's kind.
            IndexError: no such record.
        """
        roles, _ = self.spans(index)
        start, stop = int(self._documents[index]), int(self._documents[index + 1])
        sequences, _ = self._dataset[start:stop]
        return [(Role(role), tokens.astype(np.int64)) for role, tokens in zip(roles, sequences, strict=True)]

    def verify(self) -> None:
        """Read the whole ``.bin`` and compare it with its checksum, and check every record's roles.

        Raises:
            DataError: a difference.
        """
        path = file_paths(self.prefix)[0]
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != self.meta.bin_sha256:
            raise DataError(
                f"its SHA-256 is {digest}, but {self.meta.bin_sha256} was written; build it again", path=path
            )
        index = self._dataset.index
        _check_pointers(file_paths(self.prefix)[1], index.sequence_pointers, self._lengths, index.dtype_size)
        for record in range(len(self)):
            self.spans(record)


def read_meta(prefix: str | Path) -> IndexedMeta:
    """The metadata of a prefix.

    Raises:
        DataError: no such file, or not written by this format's version.
    """
    path = file_paths(prefix)[2]
    if not path.is_file():
        raise DataError("no such file; give the prefix that build_grit.py wrote, without extension", path=path)
    try:
        values: Any = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise DataError(f"not JSON: {error}", path=path) from error
    if not isinstance(values, dict) or values.get("format") != FORMAT_NAME:
        raise DataError(f"not the metadata of an indexed file (format is not {FORMAT_NAME})", path=path)
    if values.get("version") != FORMAT_VERSION:
        raise DataError(f"format version {values.get('version')}, this is {FORMAT_VERSION}; build it again", path=path)
    try:
        meta = IndexedMeta(**values)
        RowKind(meta.kind)
    except (TypeError, ValueError) as error:
        raise DataError(f"incomplete metadata: {error}", path=path) from error
    return meta


def _check_files(prefix: str | Path, meta: IndexedMeta) -> None:
    """Compare sizes before the engine maps the files: it would read past the end of a short one without a word."""
    bin_path, idx_path, _ = file_paths(prefix)
    for path in (bin_path, idx_path):
        if not path.is_file():
            raise DataError("is missing; build the indexed file again", path=path)
    size = idx_path.stat().st_size
    with idx_path.open("rb") as file:
        header = file.read(_HEADER.size)
    if len(header) < _HEADER.size:
        raise DataError(f"ends after {size} bytes, within its header", path=idx_path, byte=size)
    magic, version, code, num_sequences, num_documents = _HEADER.unpack(header)
    if magic != _MAGIC or version != 1:
        raise DataError("not a Megatron index", path=idx_path, byte=0)
    if code not in _ITEMSIZE_OF_CODE:
        raise DataError(f"token type {code} is neither 4 (int32) nor 8 (uint16)", path=idx_path, byte=17)
    expected = _HEADER.size + num_sequences * _BYTES_PER_SEQUENCE + num_documents * _BYTES_PER_DOCUMENT
    if size != expected:
        raise DataError(f"is {size} bytes long, its header says {expected}", path=idx_path, byte=min(size, expected))
    if num_documents - 1 != meta.num_records:
        raise DataError(f"holds {num_documents - 1} records, its .json says {meta.num_records}", path=idx_path, byte=26)
    size = bin_path.stat().st_size
    expected = meta.num_tokens * _ITEMSIZE_OF_CODE[code]
    if size != expected:
        raise DataError(
            f"is {size} bytes long, its index says {expected}; build it again", path=bin_path, byte=min(size, expected)
        )


def _check_pointers(idx_path: Path, pointers: np.ndarray, lengths: np.ndarray, itemsize: int) -> None:
    """Raise unless the sequences follow one another without a gap."""
    ends = np.cumsum(lengths, dtype=np.int64) * itemsize
    wrong = np.flatnonzero(pointers != ends - lengths.astype(np.int64) * itemsize)
    if len(wrong):
        byte = _HEADER.size + 4 * len(lengths) + 8 * int(wrong[0])
        raise DataError(f"sequence {wrong[0]} does not start where the one before it ends", path=idx_path, byte=byte)
