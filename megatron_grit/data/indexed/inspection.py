"""An indexed file in readable form: what each token is used for, in colour."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from megatron_grit.config.options import ShownRecords
from megatron_grit.data.indexed.reader import IndexedFile, IndexedMeta, describe_skipped, file_paths, read_meta
from megatron_grit.data.indexed.records import IndexedRecords
from megatron_grit.data.indexed.roles import Role, pooled, supervised
from megatron_grit.data.text.tokenizer import Tokenizer
from megatron_grit.errors import DataError

_RESET = "\x1b[0m"
_COLOURS = {"supervised": "\x1b[32m", "pooled": "\x1b[36m", "attended": "\x1b[2m"}
_MEANING = {
    "supervised": "label of the next-token loss",
    "pooled": "averaged into an embedding",
    "attended": "seen and nothing else",
}
_VISIBLE = str.maketrans({" ": "·", "\n": "⏎", "\t": "⇥", "\r": "␍"})


def usage(role: Role) -> str:
    """What a span's tokens are used for: "supervised", "pooled", or "attended" and nothing else."""
    if supervised(role):
        return "supervised"
    return "pooled" if pooled(role) else "attended"


def describe_records(
    prefix: str | Path, tokenizer: Tokenizer | None = None, *, start: int = 0, count: int = 3, colour: bool = False
) -> Iterator[str]:
    """Lines that show an indexed file and some of its records, span by span.

    White space is shown as ``·`` (space), ``⏎`` (newline), ``⇥`` (tab) and ``␍`` (carriage return).

    Args:
        prefix: path without extension; also of a file of Megatron's that has no ``.json``.
        tokenizer: turns ids into text. None: ids are shown.
        start: first record.
        count: records.
        colour: mark with terminal colours what is supervised, pooled and only attended.

    Raises:
        DataError: a damaged file, another tokenizer than it was built with, or no record ``start``.
    """
    ShownRecords(show=count, start=start)
    meta = read_meta(prefix) if _is_ours(prefix) else None
    other = tokenizer and meta and meta.other_tokenizer(tokenizer.path, tokenizer.fingerprint)
    if other:
        raise DataError(f"{other}; give that one", path=f"{prefix}.json")
    file = IndexedFile(prefix) if meta is None else IndexedRecords(prefix).file
    try:
        if count and not 0 <= start < file.num_documents:
            raise DataError(f"has {file.num_documents} records, so no record {start}", path=file.idx_path)
        yield _header(file, meta)
        yield "; ".join(_paint(f"{used}: {meaning}", used, colour) for used, meaning in _MEANING.items())
        for index in range(start, min(start + count, file.num_documents)):
            yield f"record {index}"
            yield from _spans(file, index, tokenizer, colour)
    finally:
        file.close()


def verify_file(prefix: str | Path) -> str:
    """Read all of a file and compare it with its checksums, or its index alone where there is no ``.json``.

    Returns:
        What was compared.

    Raises:
        DataError: a difference.
    """
    if _is_ours(prefix):
        records = IndexedRecords(prefix)
        records.verify()
        records.close()
        return "verified: checksums, index and roles"
    file = IndexedFile(prefix)
    file.check_index()
    file.close()
    return "verified: index; without a .json there is no checksum"


def _is_ours(prefix: str | Path) -> bool:
    """Whether there is, or should be, a ``.json``."""
    _, index, meta = file_paths(prefix)
    return meta.exists() or not index.exists()


def _header(file: IndexedFile, meta: IndexedMeta | None) -> str:
    if meta is None:
        modes = "without modes" if file.modes is None else "with modes"
        num_tokens = file.bin_bytes // file.dtype.itemsize
        return (
            f"{file.prefix}: {file.num_documents} documents{describe_skipped(len(file.short_documents()))}, "
            f"{file.num_sequences} sequences, {num_tokens} tokens of {file.dtype}, {modes}, no .json"
        )
    return (
        f"{file.prefix}: {meta.num_records} {meta.kind} records{describe_skipped(meta.num_skipped)}, "
        f"{meta.num_tokens} tokens, "
        f"{meta.num_supervised_tokens} supervised, negatives {meta.min_negatives} to {meta.max_negatives}, "
        f"longest segment {meta.longest_segment_tokens}, template {meta.template or 'none'}, limits {meta.limits}, "
        f"tokenizer {meta.tokenizer_fingerprint[:12]}"
    )


def _paint(text: str, used: str, colour: bool) -> str:
    return f"{_COLOURS[used]}{text}{_RESET}" if colour else text


def _spans(file: IndexedFile, index: int, tokenizer: Tokenizer | None, colour: bool) -> Iterator[str]:
    """A line for each span of a record."""
    first, stop = file.sequences(index)
    if first == stop:
        yield "  empty"
    sequences = [file.read(place, place + 1) for place in range(first, stop)]
    numbers = [" ".join(map(str, ids)) for ids in sequences]
    texts = numbers if tokenizer is None else _spell(tokenizer, sequences, file)
    modes = [int(Role.TEXT)] * len(sequences) if file.modes is None else file.modes[first:stop].tolist()
    known = {int(role): role for role in Role}
    for mode, ids, text in zip(modes, sequences, texts, strict=True):
        role = known.get(mode)
        name, used = ("MODE " + str(mode), "attended") if role is None else (role.name, usage(role))
        yield f"  {name:20s} {used:10s} {len(ids):6d}  {_paint(text, used, colour)}"


def _spell(tokenizer: Tokenizer, sequences: Sequence[np.ndarray], file: IndexedFile) -> list[str]:
    """Text of each sequence, special tokens by name.

    Decoding a sequence alone would lose the space it begins with, so each is decoded with what stands before it, back
    to the last special token.
    """
    special = {index: name for name, index in tokenizer.special_tokens.items()}
    special |= {index: tokenizer.id_to_token(index) for index in (tokenizer.bos_id, tokenizer.eos_id)}
    texts = []
    stretch: list[int] = []
    for ids in sequences:
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < tokenizer.vocab_size:
            raise DataError(f"holds ids that {tokenizer.path} does not have", path=file.bin_path)
        text = ""
        before = tokenizer.decode(stretch)
        for index in ids.tolist():
            if index in special:
                text += tokenizer.decode(stretch)[len(before) :].translate(_VISIBLE) + special[index]
                stretch, before = [], ""
            else:
                stretch.append(index)
        texts.append(text + tokenizer.decode(stretch)[len(before) :].translate(_VISIBLE))
    return texts
