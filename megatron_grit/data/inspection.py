"""An indexed file in readable form."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from megatron_grit.data.indexed import IndexedRecords
from megatron_grit.data.roles import Role, pooled, supervised
from megatron_grit.data.tokenizer import Tokenizer
from megatron_grit.errors import DataError

_RESET = "\x1b[0m"
_COLOURS = {"supervised": "\x1b[32m", "pooled": "\x1b[36m", "attended": "\x1b[2m"}


def usage(role: Role) -> str:
    """What a span's tokens are used for: "supervised", "pooled", or "attended" and nothing else."""
    if supervised(role):
        return "supervised"
    return "pooled" if pooled(role) else "attended"


def describe_records(
    prefix: str | Path, tokenizer: Tokenizer | None = None, *, start: int = 0, count: int = 3, colour: bool = False
) -> Iterator[str]:
    """Lines that show the metadata of an indexed file and some of its records, span by span.

    Args:
        prefix: path without extension.
        tokenizer: turns ids into text. None: ids are shown.
        start: first record.
        count: records.
        colour: mark with terminal colours what is supervised, pooled and only attended.

    Raises:
        DataError: a damaged file, another tokenizer than it was built with, or no record ``start``.
    """
    records = IndexedRecords(prefix)
    meta = records.meta
    if tokenizer is not None and tokenizer.fingerprint != meta.tokenizer_fingerprint:
        raise DataError(f"was built with another tokenizer than {tokenizer.path}", path=f"{prefix}.json")
    if count and not 0 <= start < len(records):
        raise DataError(f"has {len(records)} records, so no record {start}", path=f"{prefix}.json")
    yield (
        f"{prefix}: {meta.num_records} {meta.kind} records, {meta.num_tokens} tokens, "
        f"{meta.num_supervised_tokens} supervised, negatives {meta.min_negatives} to {meta.max_negatives}, "
        f"longest segment {meta.longest_segment_tokens}, limits {meta.limits}, "
        f"tokenizer {meta.tokenizer_fingerprint[:12]}"
    )
    for index in range(start, min(start + count, len(records))):
        yield f"record {index}"
        for role, ids in records.get(index):
            text = " ".join(map(str, ids)) if tokenizer is None else repr(tokenizer.decode(ids.tolist()))
            if tokenizer is not None and role is Role.ANSWER and ids[-1] == tokenizer.eos_id:
                text += " " + tokenizer.id_to_token(tokenizer.eos_id)
            used = usage(role)
            if colour:
                text = f"{_COLOURS[used]}{text}{_RESET}"
            yield f"  {role.name:20s} {used:10s} {len(ids):6d}  {text}"
