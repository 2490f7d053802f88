"""Joining indexed files."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from megatron_grit.config.values import shortened
from megatron_grit.data.indexed.reader import IndexedFile, IndexedMeta, file_paths, read_meta
from megatron_grit.data.indexed.writer import IndexedFacts, IndexedStream, refuse_existing
from megatron_grit.errors import DataError
from megatron_grit.store.files import check_output, check_prefix, check_room
from megatron_grit.store.lock import locked


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
        ConfigError: the output is one of the sources, or no prefix.
        OutputError: it cannot be written, there is no room, or another process is writing it.
    """
    if not prefixes:
        raise DataError("nothing to join")
    check_prefix(output_prefix)
    sources = [path for prefix in prefixes for path in file_paths(prefix)]
    for path in file_paths(output_prefix):
        check_output(path, sources)
    refuse_existing(output_prefix, overwrite)
    facts = [_facts_of(prefix) for prefix in prefixes]
    for prefix, found in zip(prefixes, facts, strict=True):
        if found != facts[0]:
            what = _difference(found, facts[0])
            raise DataError(f"{what} {prefixes[0]}; only files built alike can be joined", path=prefix)
    output = Path(output_prefix)
    known, first = facts[0], IndexedFile(prefixes[0])
    check_room(output, sum(path.stat().st_size for path in sources if path.suffix != ".json"))
    folder = output.with_name(f".{output.name}.merge")
    with locked(folder / "lock", output):
        for path in folder.iterdir():  # of a run that was killed
            if path.name != "lock":
                path.unlink()
        stream = IndexedStream(folder, "merged", first.dtype, with_modes=first.modes is not None)
        try:
            for prefix in prefixes:
                stream.extend(IndexedFile(prefix))
            return stream.finalize(output, None if known is None else lambda: known, overwrite=overwrite)
        finally:
            stream.discard()
            shutil.rmtree(folder, ignore_errors=True)


def _difference(found: IndexedFacts | None, first: IndexedFacts | None) -> str:
    """What the .json of one file says otherwise than that of the first: "has vocab_size 70000, not 300 as"."""
    if found is None or first is None:
        return f"has {'no' if found is None else 'a'} .json, unlike"
    names = [field.name for field in fields(IndexedFacts)]
    name = next(name for name in names if getattr(found, name) != getattr(first, name))
    return f"has {name} {shortened(getattr(found, name))}, not {shortened(getattr(first, name))} as"


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
        template_source=meta.template_source,
        template_rules=meta.template_rules,
        template_turns=meta.template_turns,
        template_date=meta.template_date,
    )
