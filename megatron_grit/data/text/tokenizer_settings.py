"""What lies beside a tokenizer.json, as transformers reads it: names of its special tokens, and tokens to add to it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_grit.errors import DataError


def read_settings(tokenizer_path: Path) -> dict[str, Any]:
    """What ``tokenizer_config.json`` beside a tokenizer's file says; nothing where there is none.

    As in transformers, names of ``special_tokens_map.json`` count before its own unless it has an
    ``added_tokens_decoder``.

    Raises:
        DataError: a file that is no JSON object.
    """
    settings = _read_object(tokenizer_path.with_name("tokenizer_config.json"))
    if "added_tokens_decoder" not in settings:
        settings |= _read_object(tokenizer_path.with_name("special_tokens_map.json"))
    return settings


def token_name(value: object) -> str | None:
    """Name of a token in tokenizer_config.json, which writes it as a string or as an object with ``content``."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def added_tokens(tokenizer_path: Path, settings: dict[str, Any], tokenizer: Any) -> list[Any]:
    """Tokens to add to a ``tokenizers.Tokenizer``, by id: those of ``added_tokens_decoder``; without it those of
    ``added_tokens.json`` that the tokenizer has not added itself.

    Args:
        tokenizer_path: of the tokenizer's file.
        settings: of :func:`read_settings`.
        tokenizer: what the file holds.

    Raises:
        DataError: they are no tokens by id.
    """
    import tokenizers

    named = {token_name(settings.get(key)) for key in ("bos_token", "eos_token", "pad_token", "unk_token")}
    where = tokenizer_path.with_name("tokenizer_config.json")
    try:
        if "added_tokens_decoder" in settings:
            entries = sorted((int(index), dict(entry)) for index, entry in settings["added_tokens_decoder"].items())
            for _, entry in entries:
                entry.pop("__type", None)
                entry["special"] = entry.get("special", False) or entry["content"] in named
            return [tokenizers.AddedToken(**entry) for _, entry in entries]
        where = tokenizer_path.with_name("added_tokens.json")
        there = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
        names = {int(index): name for name, index in _read_object(where).items() if name not in there}
        return [
            tokenizers.AddedToken(name, special=name in named, normalized=name not in named)
            for _, name in sorted(names.items())
        ]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        what = "added_tokens_decoder" if where.name == "tokenizer_config.json" else "it"
        raise DataError(f"{what} holds no tokens by id: {error}", path=where) from error


def _read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        settings = json.loads(path.read_bytes())
    except ValueError as error:
        raise DataError(f"not JSON: {error}", path=path) from error
    if not isinstance(settings, dict):
        raise DataError("expected a JSON object", path=path)
    return settings
