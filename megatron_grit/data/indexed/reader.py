"""Reading indexed files: Megatron's ``.bin`` and ``.idx``, with a role for every sequence and a ``.json`` about them.

A record is a document, its spans are the document's sequences, and a sequence's mode byte is its
:class:`~megatron_grit.data.indexed.roles.Role`. Any tool that reads Megatron's indexed datasets reads these, and
:class:`IndexedFile` reads what Megatron wrote. docs/data_formats.md has the bytes.

The engine's own reader maps the ``.bin`` without comparing its size with the index, so that a file that was cut short
reads as zeros or ends the process. Here sizes are compared on opening, and every read checks the part of the index that
it uses. Nothing here imports torch: preprocessing starts many processes.
"""

from __future__ import annotations

import itertools
import json
import os
import struct
import weakref
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_grit.data.indexed.roles import RowKind
from megatron_grit.errors import DataError
from megatron_grit.store.digest import digest_of_settings

FORMAT_NAME = "megatron_grit.indexed"
FORMAT_VERSION = 2
DOCUMENTS = "documents"
"""Kind of a file without roles, of preprocess_data.py. Its documents read as generative records of one TEXT."""

HEADER = struct.Struct("<9sQBQQ")  # magic, version, code of the token type, sequences, documents + 1
MAGIC = b"MMIDIDX\x00\x00"
DTYPE_OF_CODE = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
"""The engine's codes of integer types. It also has 6 and 7, for floating point numbers."""
_DOCUMENTS_AT_A_TIME = 1 << 20
_BOTH_ENDS = np.array([0, 1])
CHECKED_BLOCK_BYTES = 1 << 24
"""Bytes of the ``.bin`` that one CRC-32 of the metadata stands for."""


def token_dtype(vocab_size: int) -> type[np.uint16] | type[np.int32]:
    """Type of the tokens in the ``.bin``: 2 bytes for a vocabulary under 65,500, as Megatron has it, else 4."""
    return np.uint16 if vocab_size < 65500 else np.int32


_ABSENT = {
    "template_source": None,
    "template_rules": 1,
    "template_turns": None,
    "template_date": None,
    "num_skipped": 0,
}
"""Values of the metadata that are not written."""


@dataclass(frozen=True, kw_only=True)
class IndexedMeta:
    """The ``.json`` beside an indexed file."""

    kind: str
    """"embedding", "generative", or "documents": plain text without roles."""
    num_records: int
    num_tokens: int
    num_supervised_tokens: int
    """Tokens that are labels of the next-token loss. 0 for embedding records."""
    longest_segment_tokens: int
    """Longest stretch that attends to itself: a query, passage, text or conversation; of preference records the longest
    record, whose conversations share a row."""
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
    idx_bytes: int
    bin_sha256: str
    """Empty in a file that was written without checksums; so are the next two."""
    idx_sha256: str
    bin_crc32: list[int] = field(default_factory=list)
    """Of each CHECKED_BLOCK_BYTES of the ``.bin``: tells where it is damaged."""
    template_source: str | dict[str, Any] | None = None
    """What ``template`` is, where its name does not say it: Jinja, or the fields of a template of the user's."""
    template_rules: int = 1
    """By which a template became ids: ``RULES`` of :mod:`megatron_grit.data.chat.chat_format`."""
    template_turns: str | None = None
    """Which answers were kept of a template that writes earlier ones otherwise: "each" or "last"."""
    template_date: str | None = None
    """What ``strftime_now`` said. None: the template did not need it."""
    num_skipped: int = 0
    """Documents of fewer than two tokens, which have none to predict: training skips them."""
    format: str = FORMAT_NAME
    version: int = FORMAT_VERSION

    @property
    def conversation_limit(self) -> int | None:
        """Tokens beyond which conversations were cut. None: they were not."""
        return self.limits.get("generative")

    def to_json(self) -> str:
        """Text of the ``.json``: the fields, and the SHA-256 of what they say."""
        values = asdict(self)
        for name, absent in _ABSENT.items():
            if values[name] == absent:
                del values[name]
        return json.dumps({**values, "sha256": digest_of_settings(values)}, indent=2) + "\n"

    def other_tokenizer(self, path: Path, fingerprint: str) -> str | None:
        """What to say of a tokenizer that is not the one the file was built with. None: it is that one.

        Args:
            path: of its file.
            fingerprint: SHA-256 of that.
        """
        if fingerprint == self.tokenizer_fingerprint:
            return None
        built, given = self.tokenizer_fingerprint[:12], fingerprint[:12]
        return f"was built with another tokenizer than {path} (SHA-256 {built}..., not {given}...)"


def describe_skipped(count: int) -> str:
    """What follows the number of documents in a line about a file: how many of them training skips."""
    return f" ({count} of them without a token to predict: empty, or of one token)" if count else ""


def file_paths(prefix: str | Path) -> tuple[Path, Path, Path]:
    """The ``.bin``, ``.idx`` and ``.json`` of a prefix."""
    name = os.fspath(prefix)
    return Path(f"{name}.bin"), Path(f"{name}.idx"), Path(f"{name}.json")


def read_meta(prefix: str | Path) -> IndexedMeta:
    """The metadata of a prefix.

    Raises:
        DataError: no such file, not written by this format's version, or changed since.
    """
    path = file_paths(prefix)[2]
    if not path.is_file():
        if all(beside.is_file() for beside in file_paths(prefix)[:2]):
            raise DataError(
                "no such file, though .bin and .idx are there: another program wrote them, or a build did not end; "
                f"check them and write it with megatron-grit adopt-indexed --prefix {prefix} --tokenizer TOKENIZER, or "
                "build from the texts with megatron-grit preprocess-data",
                path=path,
            )
        raise DataError(
            "no such file; give the prefix of an indexed file, without extension, as megatron-grit build-sft, "
            "build-grit, build-preference, build-rollouts and preprocess-data write them",
            path=path,
        )
    try:
        values: Any = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        byte = error.pos if isinstance(error, json.JSONDecodeError) else None
        raise DataError(f"not JSON: {error}", path=path, byte=byte) from error
    if not isinstance(values, dict) or values.get("format") != FORMAT_NAME:
        raise DataError(f"not the metadata of an indexed file (format is not {FORMAT_NAME})", path=path)
    if values.get("version") != FORMAT_VERSION:
        raise DataError(f"format version {values.get('version')}, this is {FORMAT_VERSION}; build it again", path=path)
    digest = values.pop("sha256", None)
    if digest != digest_of_settings(values):
        raise DataError("was changed or damaged: it does not match its own checksum; build it again", path=path)
    try:
        meta = IndexedMeta(**values)
        if meta.kind != DOCUMENTS:
            RowKind(meta.kind)
    except (TypeError, ValueError) as error:
        raise DataError(f"incomplete metadata: {error}", path=path) from error
    return meta


class IndexedFile:
    """A ``.bin`` and ``.idx`` of Megatron, ours or not. Reads by position; never maps the ``.bin``.

    Args:
        prefix: path without extension.

    Attributes:
        dtype: type of the tokens.
        lengths: int32 [num_sequences], tokens of each sequence; mapped.
        pointers: int64 [num_sequences], where each starts in the ``.bin``, in bytes; mapped.
        documents: int64 [num_documents + 1], first sequence of each document, then num_sequences; mapped.
        modes: int8 [num_sequences], or None in a file without them; mapped.

    Raises:
        DataError: a file is missing, is no Megatron index, or is not as long as it should be; with the byte where it
            goes wrong.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = str(prefix)
        self.bin_path, self.idx_path, _ = file_paths(prefix)
        for path in (self.bin_path, self.idx_path):
            if not path.is_file():
                raise DataError("is missing; build the indexed file again", path=path)
        size = self.idx_path.stat().st_size
        with self.idx_path.open("rb") as file:
            header = file.read(HEADER.size)
        code, num_sequences, num_documents, has_modes = _check_header(self.idx_path, header, size)
        self.num_sequences, self.num_documents = num_sequences, num_documents - 1
        self.dtype = np.dtype(DTYPE_OF_CODE[code])
        mapped = np.memmap(self.idx_path, dtype=np.uint8, mode="r")

        def view(dtype: str, count: int, offset: int) -> np.ndarray:
            return np.frombuffer(mapped, dtype=dtype, count=count, offset=offset)

        self._pointers_at = HEADER.size + 4 * num_sequences
        self._documents_at = self._pointers_at + 8 * num_sequences
        self.modes_at = self._documents_at + 8 * num_documents
        """First byte of the modes in the ``.idx``."""
        self.lengths = view("<i4", num_sequences, HEADER.size)
        self.pointers = view("<i8", num_sequences, self._pointers_at)
        self.documents = view("<i8", num_documents, self._documents_at)
        self.modes = view("<i1", num_sequences, self.modes_at) if has_modes else None
        descriptor = os.open(self.bin_path, os.O_RDONLY)
        self._descriptor = descriptor
        self.close = weakref.finalize(self, os.close, descriptor)
        """Release the ``.bin``; also done when the object goes."""
        self.bin_bytes = os.fstat(descriptor).st_size
        self._check_ends()

    def _check_ends(self) -> None:
        count, itemsize = self.num_sequences, self.dtype.itemsize
        expected = int(self.pointers[-1]) + int(self.lengths[-1]) * itemsize if count else 0
        if self.bin_bytes != expected:
            raise DataError(
                f"is {self.bin_bytes} bytes long, its index says {expected}; build it again",
                path=self.bin_path,
                byte=max(0, min(self.bin_bytes, expected)),
            )
        if int(self.documents[0]) != 0:
            raise DataError("the first document does not start at 0", path=self.idx_path, byte=self._documents_at)
        if int(self.documents[-1]) != count:
            byte = self._documents_at + 8 * self.num_documents
            raise DataError(f"the last document does not end at sequence {count}", path=self.idx_path, byte=byte)

    def sequences(self, document: int) -> tuple[int, int]:
        """Sequences of a document: half-open.

        Raises:
            DataError: an index that goes backwards.
            IndexError: no such document.
        """
        if not 0 <= document < self.num_documents:
            raise IndexError(f"document {document} of {self.num_documents}")
        start, stop = self.documents[document : document + 2].tolist()
        if not 0 <= start <= stop <= self.num_sequences:
            raise DataError(
                f"document {document} holds sequences {start} to {stop}; build it again",
                path=self.idx_path,
                byte=self._documents_at + 8 * document,
            )
        return start, stop

    def read(self, start: int, stop: int, skip: int = 0, count: int | None = None) -> np.ndarray:
        """Tokens of sequences ``start`` to ``stop - 1``, one after another, in the file's own type.

        Args:
            start: first sequence.
            stop: sequence after the last.
            skip: tokens to leave out at the beginning.
            count: tokens to read. None: all that are left.

        Raises:
            DataError: the index is damaged here, or the ``.bin`` ends too early.
            IndexError: no such sequences, or fewer tokens than asked for.
        """
        if not 0 <= start <= stop <= self.num_sequences:
            raise IndexError(f"sequences {start} to {stop} of {self.num_sequences}")
        if start == stop:
            return np.empty(0, dtype=self.dtype)
        itemsize = self.dtype.itemsize
        begin, end = self._extent(start, stop)
        available = (end - begin) // itemsize
        count = available - skip if count is None else count
        if skip < 0 or count < 0 or skip + count > available:
            raise IndexError(f"tokens {skip} to {skip + count} of {available}")
        content = os.pread(self._descriptor, count * itemsize, begin + skip * itemsize)
        if len(content) < count * itemsize:
            content += self._read_on(count * itemsize - len(content), begin + skip * itemsize + len(content))
        return np.frombuffer(content, dtype=self.dtype)

    def _read_on(self, size: int, offset: int) -> bytes:
        """The rest of a read that came back short, as reads of more than 2 GiB do."""
        content = b""
        while len(content) < size:
            more = os.pread(self._descriptor, size - len(content), offset + len(content))
            if not more:
                raise DataError("ends here; it was cut short while it was open", path=self.bin_path, byte=offset)
            content += more
        return content

    def _extent(self, start: int, stop: int) -> tuple[int, int]:
        """First byte of sequence ``start`` and last of ``stop - 1``, with every pointer between them checked."""
        itemsize = self.dtype.itemsize
        pointers = self.pointers[start : stop + 1].tolist()
        if stop == self.num_sequences:
            pointers.append(self.bin_bytes)
        place = begin = pointers[0]
        for index, length in enumerate(self.lengths[start:stop].tolist()):
            following = place + length * itemsize
            if length < 0 or place < 0 or pointers[index + 1] != following:
                raise DataError(
                    f"sequence {start + index} is said to be {length} tokens from byte {place} of the .bin, the next "
                    f"one to start at {pointers[index + 1]}; the index is damaged, build it again",
                    path=self.idx_path,
                    byte=self._pointers_at + 8 * (start + index),
                )
            place = following
        return begin, place

    def extents(self, documents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where documents are in the ``.bin``: first byte and tokens of each, int64 of the shape of ``documents``.

        Raises:
            IndexError: no such document.
            DataError: an index that goes backwards, or out of the ``.bin``.
        """
        documents = np.asarray(documents, dtype=np.int64)
        if ((documents < 0) | (documents >= self.num_documents)).any():
            raise IndexError(f"documents {documents.min()} to {documents.max()} of {self.num_documents}")
        sequences = self.documents[np.add.outer(_BOTH_ENDS, documents)]
        wrong = (sequences[0] < 0) | (sequences[0] > sequences[1]) | (sequences[1] > self.num_sequences)
        inside = (sequences >= 0) & (sequences < self.num_sequences)
        if inside.all():
            edges = self.pointers[sequences]
        else:
            edges = np.full(sequences.shape, self.bin_bytes, dtype=np.int64)
            edges[inside] = self.pointers[sequences[inside]]
        wrong |= (edges[0] < 0) | (edges[0] > edges[1]) | (edges[1] > self.bin_bytes)
        if wrong.any():
            document = int(documents[wrong].flat[0])
            raise DataError(
                f"document {document} has no possible place in the .bin; build it again",
                path=self.idx_path,
                byte=self._documents_at + 8 * document,
            )
        return edges[0], (edges[1] - edges[0]) // self.dtype.itemsize

    def short_documents(self) -> np.ndarray:
        """Documents of fewer than two tokens, ascending: int64. Reads the whole index.

        Raises:
            DataError: an index that goes backwards, or out of the ``.bin``.
        """
        found = [np.empty(0, dtype=np.int64)]
        for start in range(0, self.num_documents, _DOCUMENTS_AT_A_TIME):
            documents = np.arange(start, min(start + _DOCUMENTS_AT_A_TIME, self.num_documents))
            found.append(documents[self.extents(documents)[1] < 2])
        return np.concatenate(found)

    def read_runs(self, begins: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """``counts[i]`` tokens from byte ``begins[i]`` on, for every i, one run after another. It makes one call of the
        system for each run and none of numpy, so it is several times as fast as :meth:`read`.

        Args:
            begins: int64 [n].
            counts: int64 [n].

        Returns:
            [sum of counts], of this file's type.

        Raises:
            DataError: the ``.bin`` ends too early.
        """
        sizes = (counts * self.dtype.itemsize).tolist()
        parts = list(map(os.pread, itertools.repeat(self._descriptor), sizes, begins.tolist()))
        content = b"".join(parts)
        if len(content) != sum(sizes):
            byte = next(
                begin for part, size, begin in zip(parts, sizes, begins.tolist(), strict=True) if len(part) < size
            )
            raise DataError("ends here; it was cut short while it was open", path=self.bin_path, byte=byte)
        return np.frombuffer(content, dtype=self.dtype)

    def check_index(self) -> None:
        """Compare the whole index with itself: every sequence starts where the one before it ends, no document goes
        backwards.

        Raises:
            DataError: a difference.
        """
        step = 1 << 20
        for start in range(0, self.num_sequences, step):
            stop = min(start + step, self.num_sequences)
            lengths = self.lengths[start:stop].astype(np.int64)
            following = self.pointers[start + 1 : stop + 1]
            if stop == self.num_sequences:
                following = np.append(following, self.bin_bytes)
            wrong = np.flatnonzero(
                (self.pointers[start:stop] + lengths * self.dtype.itemsize != following) | (lengths < 0)
            )
            if len(wrong):
                self._extent(start + int(wrong[0]), start + int(wrong[0]) + 1)
        backwards = np.flatnonzero(np.diff(self.documents) < 0)
        if len(backwards):
            self.sequences(int(backwards[0]))


def _check_header(path: Path, header: bytes, size: int) -> tuple[int, int, int, bool]:
    """Code of the token type, sequences, documents + 1, and whether there are modes, of a header that holds up."""
    if len(header) < HEADER.size:
        raise DataError(f"ends after {size} bytes, within its header", path=path, byte=size)
    magic, version, code, num_sequences, num_documents = HEADER.unpack(header)
    if magic != MAGIC:
        raise DataError("not a Megatron index", path=path, byte=0)
    if version != 1:
        raise DataError(f"index version {version}; 1 is known", path=path, byte=9)
    if code not in DTYPE_OF_CODE:
        raise DataError(f"token type {code} is none of {sorted(DTYPE_OF_CODE)}, the integers", path=path, byte=17)
    if num_documents < 1:
        raise DataError("has no document boundaries", path=path, byte=26)
    without = HEADER.size + num_sequences * 12 + num_documents * 8
    if size not in (without, without + num_sequences):
        raise DataError(
            f"is {size} bytes long, its header says {without}, or {without + num_sequences} with modes; build it again",
            path=path,
            byte=min(size, without),
        )
    return code, num_sequences, num_documents, num_sequences > 0 and size == without + num_sequences
