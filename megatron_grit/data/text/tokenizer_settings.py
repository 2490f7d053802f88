"""What lies beside a tokenizer's file, as transformers reads it: names of special tokens, and tokens to add to it."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from megatron_grit.errors import DataError

_AS_JSON = (
    "give a tokenizer.json, which transformers writes: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
)


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


def added_tokens(tokenizer_path: Path, settings: dict[str, Any], there: Collection[str]) -> dict[int, Any]:
    """Tokens to add to a tokenizer, as ``tokenizers.AddedToken``, by the ids that the files state, in order: those of
    ``added_tokens_decoder``; without it those of ``added_tokens.json`` that the tokenizer has not added itself.

    Args:
        tokenizer_path: of the tokenizer's file.
        settings: of :func:`read_settings`.
        there: names of the tokens that the tokenizer has added itself.

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
            return {index: tokenizers.AddedToken(**entry) for index, entry in entries}
        where = tokenizer_path.with_name("added_tokens.json")
        names = {int(index): name for name, index in _read_object(where).items() if name not in there}
        return {
            index: tokenizers.AddedToken(name, special=name in named, normalized=name not in named)
            for index, name in sorted(names.items())
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        what = "added_tokens_decoder" if where.name == "tokenizer_config.json" else "it"
        raise DataError(f"{what} holds no tokens by id: {error}", path=where) from error


def tokens_of_pieces(path: Path, settings: dict[str, Any], processor: Any) -> dict[int, Any]:
    """Special and added tokens of a SentencePiece model, as ``tokenizers.AddedToken``, by id: its control pieces, and
    what the files beside it name. Those that are none of its pieces have the next ids, as in transformers.

    Args:
        path: of the model.
        settings: of :func:`read_settings`.
        processor: the model.

    Raises:
        DataError: they are no tokens by id, one that is not special stands for text that the model cuts up, one has
            another id than that of its piece or the next, or ``add_prefix_space`` is not what the model does.
    """
    from tokenizers import AddedToken

    puts_space = processor.id_to_piece(processor.encode("b")[0]).startswith("\u2581")
    if settings.get("add_prefix_space") not in (None, puts_space):
        said = f"tokenizer_config.json beside it says add_prefix_space {settings['add_prefix_space']}"
        what = f"{said}, and this model puts {'a' if puts_space else 'no'} space in front of a text"
        raise DataError(f"{what}; {_AS_JSON}", path=path)
    size = processor.get_piece_size()
    control = {processor.id_to_piece(index): index for index in range(size) if processor.is_control(index)}
    found = {index: AddedToken(name, special=True, normalized=False) for name, index in control.items()}
    named = [token_name(settings.get(key)) for key in ("bos_token", "eos_token", "pad_token")]
    pieces = [name for name in named if name is not None and _piece_id(processor, name) is not None]
    added = [(None, AddedToken(name, special=True, normalized=False)) for name in pieces]
    where = "tokenizer_config.json" if "added_tokens_decoder" in settings else "added_tokens.json"
    for stated, token in [*added, *added_tokens(path, settings, control).items()]:
        index = _piece_id(processor, token.content)
        here = max([size - 1, *found]) + 1 if index is None else index
        is_symbol = index is not None and _is_symbol(processor, index)
        if not (is_symbol or token.special):
            raise DataError(
                f"{where} beside it adds {token.content!r}, which texts are to be read as, and this model cuts it up; "
                f"{_AS_JSON}",
                path=path,
            )
        if stated not in (None, here):
            what = f"{where} beside it gives {token.content!r} the id {stated}, and with this model it has {here}"
            raise DataError(f"{what}; {_AS_JSON}", path=path)
        if not is_symbol:
            found[here] = token
    return found


def _is_symbol(processor: Any, index: int) -> bool:
    """Whether a piece is a symbol that the model defines: a token wherever its text stands."""
    name, around = processor.id_to_piece(index), "abcdefghijklmnopqrstuvwxyz<>"
    return int(processor.encode("".join(f"{one}{name}{one}" for one in around)).count(index)) == len(around)


def _piece_id(processor: Any, name: str) -> int | None:
    index = int(processor.piece_to_id(name))
    return index if processor.id_to_piece(index) == name else None


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
