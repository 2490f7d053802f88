"""The contexts that a model's neighbor encoder reads beside the records of an indexed file.

``PREFIX_contexts`` is an indexed file of documents: document i has the contexts of record i of ``PREFIX``, a sequence
each, best first. Where no record has any, there is none.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_grit.data.indexed.reader import DOCUMENTS, IndexedFile, file_paths, read_meta, token_dtype
from megatron_grit.data.indexed.records import IndexedRecords
from megatron_grit.data.indexed.writer import IndexedFacts, IndexedStream, TokenBlock
from megatron_grit.data.text.tokenizer import Tokenizer
from megatron_grit.errors import DataError

NUM_CONTEXTS = "encoder_contexts"
"""Among the limits in the ``.json`` of PREFIX: all contexts of its records."""


def context_prefix(prefix: str | Path) -> Path:
    """Prefix of the contexts of an indexed file."""
    return Path(f"{prefix}_contexts")


class ContextWriter:
    """Writes the contexts of records one record at a time. They appear when :meth:`finalize` is through, or never.

    Args:
        prefix: of the records.
        folder: for what is not whole yet.
        tokenizer: of the records.
    """

    def __init__(self, prefix: str | Path, folder: Path, tokenizer: Tokenizer) -> None:
        self._prefix, self._tokenizer = context_prefix(prefix), tokenizer
        self._stream = IndexedStream(folder, "contexts", token_dtype(tokenizer.vocab_size), with_modes=False)
        self.num_contexts = 0

    def add(self, contexts: Sequence[Sequence[int]]) -> None:
        """Append the contexts of a record, none of them empty."""
        dtype = self._stream.dtype
        self._stream.append(
            TokenBlock(
                tokens=np.concatenate([np.empty(0, dtype), *(np.asarray(ids, dtype) for ids in contexts)]),
                lengths=np.array([len(ids) for ids in contexts], dtype=np.int32),
                documents=np.array([len(contexts)], dtype=np.int32),
            )
        )
        self.num_contexts += len(contexts)

    def finalize(self) -> None:
        """Give the files their names, in place of those of an earlier build."""
        for path in file_paths(self._prefix):
            path.unlink(missing_ok=True)
        if not self.num_contexts:
            return self.discard()
        facts = IndexedFacts(
            kind=DOCUMENTS,
            tokenizer_fingerprint=self._tokenizer.fingerprint,
            vocab_size=self._tokenizer.vocab_size,
        )
        self._stream.finalize(self._prefix, lambda: facts, overwrite=True)

    def discard(self) -> None:
        """Remove the temporary files."""
        self._stream.discard()


class ContextFile:
    """The contexts of an indexed file's records.

    Args:
        records: the file.

    Raises:
        DataError: its contexts are missing, damaged, or those of another file.
    """

    def __init__(self, records: IndexedRecords) -> None:
        prefix, wanted = context_prefix(records.prefix), records.meta.limits.get(NUM_CONTEXTS, 0)
        self.sha256 = ""
        """Of their tokens; empty where there are none."""
        self._file: IndexedFile | None = None
        if not wanted:
            return
        meta, remedy = read_meta(prefix), f"build {records.prefix} again (megatron-grit build-qa)"
        self._file = IndexedFile(prefix)
        found = (self._file.num_documents, self._file.num_sequences, meta.tokenizer_fingerprint)
        if found != (len(records), wanted, records.meta.tokenizer_fingerprint):
            raise DataError(
                f"has {found[1]} contexts of {found[0]} records, and {records.prefix}.json says {wanted} of "
                f"{len(records)}; {remedy}",
                path=prefix,
            )
        self.sha256 = meta.bin_sha256

    def get(self, record: int, count: int, max_tokens: int) -> list[np.ndarray]:
        """The first contexts of a record, int64, each cut to ``max_tokens``."""
        if self._file is None:
            return []
        start, stop = self._file.sequences(record)
        sequences = range(start, min(stop, start + count))
        return [self._file.read(number, number + 1)[:max_tokens].astype(np.int64) for number in sequences]
