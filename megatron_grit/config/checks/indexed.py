"""Indexed files that a run names: whether they are there, and what makes one that is not."""

from __future__ import annotations

from pathlib import Path

TEXTS_MADE_BY = "megatron-grit build-sft (conversations), preprocess-data (texts) or build-grit (GRIT's records)"
"""What makes files of texts and conversations."""
_SUFFIXES = (".idx", ".bin", ".json")


def missing_file(prefix: str, made_by: str, tokenizer: str | None = None) -> str | None:
    """What is missing of an indexed file, and what to do; None: it is there.

    Args:
        prefix: path without extension.
        made_by: command that makes such files.
        tokenizer: of the run, where it has one.
    """
    missing = [suffix for suffix in _SUFFIXES if not Path(prefix + suffix).is_file()]
    if not missing:
        return None
    remedy = f"make it with {made_by}"
    if missing == [".json"]:
        remedy = (
            "if another program wrote .bin and .idx, write it with megatron-grit adopt-indexed --prefix "
            f"{prefix} --tokenizer {tokenizer or 'TOKENIZER'}"
        )
    return f"there is no file {prefix}{missing[0]}; {remedy}"
