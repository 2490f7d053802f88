"""Joining indexed files."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from megatron_grit.data.indexed.reader import IndexedFile, IndexedMeta, file_paths, read_meta
from megatron_grit.data.indexed.writer import IndexedFacts, IndexedStream, refuse_existing
from megatron_grit.errors import DataError


def merge_indexed(
    prefixes: Sequence[str | Path], output_prefix: str | Path, *, overwrite: bool = False
) -> IndexedMeta | None:
    """Indexed files, one after another, as one. Offsets have 64 bits, so there may be any number of tokens.

    Args:
        prefixes: what to join, in this order; with or without ``.json``, but all alike.
        output_prefix: path without extension.
        overwrite: replace files that are there.

    Returns:
        What the new ``.json`` says; None where the sources have none.

    Raises:
        DataError: no sources, sources that do not fit together, or damaged ones.
    """
    if not prefixes:
        raise DataError("nothing to join")
    refuse_existing(output_prefix, overwrite)
    facts = [_facts_of(prefix) for prefix in prefixes]
    for prefix, found in zip(prefixes, facts, strict=True):
        if found != facts[0]:
            what = "has no .json" if found is None else f"is described by {found}"
            raise DataError(f"{what}, unlike {prefixes[0]}; only files built alike can be joined", path=prefix)
    output = Path(output_prefix)
    folder = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    shutil.rmtree(folder, ignore_errors=True)
    first = IndexedFile(prefixes[0])
    stream = IndexedStream(folder, "merged", first.dtype, with_modes=first.modes is not None)
    try:
        for prefix in prefixes:
            stream.extend(IndexedFile(prefix))
        known = facts[0]
        return stream.finalize(output, None if known is None else lambda: known, overwrite=overwrite)
    finally:
        stream.discard()
        shutil.rmtree(folder, ignore_errors=True)


def _facts_of(prefix: str | Path) -> IndexedFacts | None:
    if not file_paths(prefix)[2].exists():
        return None
    meta = read_meta(prefix)
    return IndexedFacts(
        kind=meta.kind,
        tokenizer_fingerprint=meta.tokenizer_fingerprint,
        vocab_size=meta.vocab_size,
        template=meta.template,
        limits=meta.limits,
    )
