"""A ``.json`` for an indexed file of documents that another program wrote: Megatron, NeMo, datatrove.

datatrove writes ``.bin`` and ``.idx`` with its MegatronDocumentTokenizer; ``.ds`` and ``.ds.index`` of its
DocumentTokenizer are another format.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_grit.data.indexed.reader import DOCUMENTS, IndexedFile, IndexedMeta, describe_skipped, file_paths
from megatron_grit.data.indexed.records import checksums, refuse_unknown_ids
from megatron_grit.data.indexed.writer import IndexedFacts, TokenBlock, describe_files
from megatron_grit.data.text.tokenizer import Tokenizer
from megatron_grit.errors import DataError
from megatron_grit.store.files import replacing
from megatron_grit.store.progress import Progress

_DOCUMENTS_AT_A_TIME = 1 << 20
_SHOWN_TOKENS = 16


@dataclass(frozen=True, kw_only=True)
class Adopted:
    """What :func:`adopt_indexed` found."""

    prefix: str
    meta: IndexedMeta
    """What was written."""
    last_ids: dict[int, int]
    """How many documents end with each id; empty ones are not counted."""
    begin: str
    """Text of the first tokens."""


def adopt_indexed(
    prefix: str | Path, tokenizer: Tokenizer, *, overwrite: bool = False, progress: bool = False
) -> Adopted:
    """Check a ``.bin`` and an ``.idx``, whole, and write the ``.json`` with their checksums, which lets training use
    them. The two files stay as they are.

    Args:
        prefix: path without extension, or with ``.bin`` or ``.idx``.
        tokenizer: the one that the file was made with. That its ids are within its vocabulary is checked; more cannot
            be.
        overwrite: replace a ``.json`` that is there.
        progress: show a bar.

    Raises:
        DataError: a file is missing or damaged, holds mode bytes, ids outside the vocabulary or nothing, or has a
            ``.json``.
    """
    prefix = _without_extension(prefix)
    bin_path, idx_path, json_path = file_paths(prefix)
    if json_path.exists() and not overwrite:
        raise DataError("exists already, so there is nothing to adopt; replace it with --overwrite", path=json_path)
    if not bin_path.exists() and Path(f"{prefix}.ds").exists():
        raise DataError(
            "is missing; .ds and .ds.index are datatrove's own format; write .bin and .idx with its "
            "MegatronDocumentTokenizer",
            path=bin_path,
        )
    file = IndexedFile(prefix)
    try:
        if file.modes is not None:
            raise DataError(
                "has mode bytes, as multimodal files and records do; only plain documents can be adopted",
                path=idx_path,
                byte=file.modes_at,
            )
        if not file.bin_bytes:
            raise DataError("holds no token", path=bin_path)
        file.check_index()
        begin: list[int] = []
        last_ids: Counter[int] = Counter()
        with Progress(file.bin_bytes, f"reading {prefix}", "B", enabled=progress) as bar:

            def look(start: int, content: bytes) -> None:
                ids = np.frombuffer(content, dtype=file.dtype)
                refuse_unknown_ids(file, ids, start, tokenizer.vocab_size, f"give the tokenizer that {prefix} is of")
                last_ids.update(_last_ids(file, ids, start))
                begin.extend(ids[: _SHOWN_TOKENS - len(begin)].tolist())
                bar.update(len(content))

            digests = checksums(bin_path, look)
        facts = IndexedFacts(
            kind=DOCUMENTS, tokenizer_fingerprint=tokenizer.fingerprint, vocab_size=tokenizer.vocab_size
        )
        meta = describe_files(facts, _blocks(file), bin_path, idx_path, (digests, checksums(idx_path)[0]))
    finally:
        file.close()
    with replacing(json_path) as out:
        out.write(meta.to_json())
    return Adopted(prefix=prefix, meta=meta, last_ids=dict(last_ids), begin=tokenizer.decode(begin))


def describe_adopted(adopted: Adopted, tokenizer: Tokenizer) -> Iterator[str]:
    """What :func:`adopt_indexed` found, as text: counts, how documents end and how the first begins."""
    meta, ends = adopted.meta, adopted.last_ids
    yield (
        f"{adopted.prefix}: {meta.num_records} documents{describe_skipped(meta.num_skipped)}, {meta.num_tokens} tokens"
    )
    total, with_eod = sum(ends.values()), ends.get(tokenizer.eos_id, 0)
    named = f"{tokenizer.id_to_token(tokenizer.eos_id)} ({tokenizer.eos_id})"
    line = f"  {with_eod} of {total} documents that are not empty ({with_eod / total:.1%}) end with {named}"
    if with_eod < total:
        index, count = max((item for item in ends.items() if item[0] != tokenizer.eos_id), key=lambda item: item[1])
        line += f"; {count} end with {tokenizer.id_to_token(index)} ({index})"
    yield line
    yield f"  the first tokens: {adopted.begin!r}; if that is no text, this is another tokenizer than the file's"


def _without_extension(prefix: str | Path) -> str:
    name = str(prefix)
    return name[: -len(".bin")] if name.endswith((".bin", ".idx")) else name


def _blocks(file: IndexedFile) -> Iterator[TokenBlock]:
    """The documents, without their tokens."""
    for start in range(0, file.num_documents, _DOCUMENTS_AT_A_TIME):
        edges = file.documents[start : start + _DOCUMENTS_AT_A_TIME + 1]
        lengths = file.lengths[int(edges[0]) : int(edges[-1])]
        yield TokenBlock(tokens=np.empty(0), lengths=np.asarray(lengths), documents=np.diff(edges))


def _last_ids(file: IndexedFile, ids: np.ndarray, start: int) -> dict[int, int]:
    """How many of the documents that end within these tokens, which begin at byte ``start``, end with each id.

    The index is sound: sequences and documents end in their order.
    """
    stop = start + ids.nbytes

    def documents_until(byte: int) -> int:
        """Documents that end at this byte or before it."""
        after = np.searchsorted(file.pointers, byte, side="right") if byte < file.bin_bytes else file.num_sequences + 1
        return int(np.searchsorted(file.documents, after - 1, side="right")) - 1

    first, last = (documents_until(byte) if byte else 0 for byte in (start, stop))
    begins, lengths = file.extents(np.arange(first, last))
    ends = begins + lengths * file.dtype.itemsize
    chosen = ends[(lengths > 0) & (ends > start)] - start
    values, counts = np.unique(ids[chosen // file.dtype.itemsize - 1], return_counts=True)
    return dict(zip(values.tolist(), counts.tolist(), strict=True))
