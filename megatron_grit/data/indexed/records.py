"""The records of an indexed file that has a ``.json``: by number, with the role of every token."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from megatron_grit.config.checks.indexed import TEXTS_MADE_BY
from megatron_grit.data.indexed.reader import CHECKED_BLOCK_BYTES, DOCUMENTS, IndexedFile, file_paths, read_meta
from megatron_grit.data.indexed.roles import Role, RowKind, check_grammar, split_segments
from megatron_grit.errors import DataError

_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def check_texts(prefix: str | Path) -> None:
    """See whether an indexed file is there and holds what a next-token loss is measured of.

    Raises:
        DataError: it is not, or does not.
    """
    kind = read_meta(prefix).kind
    if kind not in (RowKind.GENERATIVE, DOCUMENTS):
        raise DataError(
            f"holds {kind} records; next-token loss needs generative ones, of {TEXTS_MADE_BY}",
            path=file_paths(prefix)[2],
        )


class IndexedRecords:
    """Random access to the records of an indexed file with its ``.json``.

    Files are opened when the first record is asked for, and again after :meth:`close`.

    Args:
        prefix: path without extension.

    Raises:
        DataError: a file is missing, is not of this format, or is not as long as the index or the ``.json`` says.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = str(prefix)
        self.meta = read_meta(prefix)
        self._has_roles = self.meta.kind != DOCUMENTS
        self.kind = RowKind(self.meta.kind) if self._has_roles else RowKind.GENERATIVE
        self._file: IndexedFile | None = None
        self._known: set[bytes] = set()
        bin_path, idx_path, _ = file_paths(prefix)
        for path in (idx_path, bin_path):  # an index that is missing is a build that did not end
            if not path.is_file():
                raise DataError("is missing; build the indexed file again", path=path)
        for path, size in ((bin_path, self.meta.bin_bytes), (idx_path, self.meta.idx_bytes)):
            found = path.stat().st_size
            if found != size:
                raise DataError(
                    f"is {found} bytes long, its .json says {size}; build it again", path=path, byte=min(found, size)
                )

    @property
    def file(self) -> IndexedFile:
        """The open files.

        Raises:
            DataError: damaged files.
        """
        if self._file is None:
            file = IndexedFile(self.prefix)
            for what, found, said, byte in (
                ("records", file.num_documents, self.meta.num_records, 26),
                ("bytes of tokens", file.bin_bytes, self.meta.bin_bytes, 18),
                ("bytes of tokens", file.bin_bytes, self.meta.num_tokens * file.dtype.itemsize, 17),
                ("mode bytes", file.modes is not None, self._has_roles, 18),
            ):
                if found != said:
                    raise DataError(f"holds {found} {what}, its .json says {said}", path=file.idx_path, byte=byte)
            self._file = file
        return self._file

    def close(self) -> None:
        """Release descriptors and maps."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __len__(self) -> int:
        return self.meta.num_records

    def name(self, index: int) -> str:
        """Name of a record in messages: "prefix#index"."""
        return f"{self.prefix}#{index}"

    def lengths(self) -> np.ndarray:
        """Tokens of each record: int64 [num_records]."""
        file = self.file
        ends = np.concatenate(([0], np.cumsum(file.lengths, dtype=np.int64)))
        return np.diff(ends[file.documents])

    def skipped(self) -> np.ndarray:
        """Documents without a token to predict, which training skips, ascending: int64 [meta.num_skipped].

        Raises:
            DataError: a damaged index.
        """
        if not self.meta.num_skipped:
            return np.empty(0, dtype=np.int64)
        found = self.file.short_documents()
        if len(found) != self.meta.num_skipped:
            raise DataError(
                f"holds {len(found)} documents of fewer than two tokens, its .json says {self.meta.num_skipped}; "
                "build it again",
                path=self.file.idx_path,
            )
        return found

    def spans(self, index: int) -> tuple[list[int], list[int]]:
        """Roles and lengths of a record's spans. No token is read.

        Raises:
            DataError: roles that make no record of this file's kind, or a damaged index.
            IndexError: no such record.
        """
        start, stop = self.file.sequences(index)
        lengths = self.file.lengths[start:stop].tolist()
        if not self._has_roles:
            return [int(Role.TEXT)], [sum(lengths)]
        return self._roles(index, start, stop), lengths

    def segment_lengths(self, records: np.ndarray) -> np.ndarray:
        """Tokens of each segment of some records, but for those without a token to predict: int64 [num_segments]. No
        token is read. The conversations of a preference record count as one segment.

        Raises:
            DataError: roles that make no record of this file's kind, or a damaged index.
            IndexError: no such record.
        """
        if self.kind is not RowKind.EMBEDDING:
            lengths = self.file.extents(records)[1]
            return lengths[lengths > 1]
        found: list[int] = []
        for record in records.tolist():
            roles, sizes = self.spans(record)
            found += [sum(sizes[first:last]) for first, last in split_segments(roles)]
        return np.array(found, dtype=np.int64)

    def _roles(self, index: int, start: int, stop: int) -> list[int]:
        assert self.file.modes is not None
        word = self.file.modes[start:stop].tobytes()
        roles = np.frombuffer(word, dtype=np.int8).tolist()
        if word not in self._known:
            try:
                check_grammar(roles, self.kind, self.name(index))
            except DataError as error:
                place = self.file.modes_at + start
                raise DataError(f"{error}; build it again", path=self.file.idx_path, byte=place) from None
            self._known.add(word)
        return roles

    def tokens(self, index: int, skip: int = 0, count: int | None = None) -> np.ndarray:
        """Tokens of a record, all spans together, in the file's own type.

        Args:
            index: the record.
            skip: tokens to leave out at the beginning.
            count: tokens to read. None: all that are left.

        Raises:
            DataError: a damaged file, or an id outside the vocabulary.
            IndexError: no such record, or fewer tokens than asked for.
        """
        start, stop = self.file.sequences(index)
        ids = self.file.read(start, stop, skip, count)
        if len(ids):
            begin = int(self.file.pointers[start]) + skip * self.file.dtype.itemsize
            refuse_unknown_ids(self.file, ids, begin, self.meta.vocab_size, "build it again")
        return ids

    def get(self, index: int) -> list[tuple[Role, np.ndarray]]:
        """Spans of a record: role and tokens, int64.

        Raises:
            DataError: roles that make no record of this file's kind, or a damaged file.
            IndexError: no such record.
        """
        roles, lengths = self.spans(index)
        parts = np.split(self.tokens(index).astype(np.int64), np.cumsum(lengths)[:-1])
        return [(Role(role), part) for role, part in zip(roles, parts, strict=True)]

    def verify(self) -> None:
        """Read both files whole and compare them with their checksums and with each other, and check every record's
        roles.

        Raises:
            DataError: a difference, or a file that was written without checksums.
        """
        meta, file = self.meta, self.file
        if not meta.bin_sha256:
            raise DataError("was written without checksums; build it again with them", path=file_paths(self.prefix)[2])
        digest, checks = checksums(file.bin_path)
        if digest != meta.bin_sha256:
            pairs = zip(checks, meta.bin_crc32, strict=False)
            block = next((number for number, (found, said) in enumerate(pairs) if found != said), 0)
            raise DataError(
                f"its SHA-256 is {digest}, but {meta.bin_sha256} was written; the first damage is within "
                f"{CHECKED_BLOCK_BYTES} bytes of here; build it again",
                path=file.bin_path,
                byte=block * CHECKED_BLOCK_BYTES,
            )
        file.check_index()
        for record in range(len(self)):
            self.spans(record)
        digest, _ = checksums(file.idx_path)
        if digest != meta.idx_sha256:
            raise DataError(
                f"its SHA-256 is {digest}, but {meta.idx_sha256} was written; build it again",
                path=file.idx_path,
                byte=0,
            )


def refuse_unknown_ids(file: IndexedFile, ids: np.ndarray, begin: int, vocab_size: int, remedy: str) -> None:
    """Raise where some of a file's tokens are outside the vocabulary.

    Args:
        file: whose they are.
        ids: the tokens, in the file's own type.
        begin: byte of the first of them in the ``.bin``.
        vocab_size: ids are below it.
        remedy: what to do.

    Raises:
        DataError: one is not; with its document and byte.
    """
    unsigned = ids.view(_UNSIGNED[ids.dtype.itemsize])  # a negative id is beyond every vocabulary
    if not len(ids) or unsigned.max() < vocab_size:
        return
    place = int(np.argmax(unsigned >= vocab_size))
    at = begin + place * ids.dtype.itemsize
    sequence = int(np.searchsorted(file.pointers, at, side="right")) - 1
    record = int(np.searchsorted(file.documents, sequence, side="right")) - 1
    raise DataError(
        f"record {record} holds the id {ids[place]}, outside the vocabulary of {vocab_size}; {remedy}",
        path=file.bin_path,
        byte=at,
    )


def checksums(path: Path, look: Callable[[int, bytes], object] | None = None) -> tuple[str, list[int]]:
    """SHA-256 of a file in hexadecimal, and the CRC-32 of each CHECKED_BLOCK_BYTES of it.

    Args:
        path: the file.
        look: called with the first byte and the content of each block, in order.
    """
    digest = hashlib.sha256()
    checks: list[int] = []
    with path.open("rb") as file:
        while block := file.read(CHECKED_BLOCK_BYTES):
            if look is not None:
                look(len(checks) * CHECKED_BLOCK_BYTES, block)
            digest.update(block)
            checks.append(zlib.crc32(block))
    return digest.hexdigest(), checks
