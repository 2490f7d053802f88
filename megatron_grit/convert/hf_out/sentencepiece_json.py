"""A SentencePiece model as a tokenizer.json that gives the same ids.

Each stretch of text between special tokens gets the space in front that the model asks for, as our tokenizer does it.
User-defined pieces are cut out of the text before anything is merged, and no space follows them.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

from megatron_grit.errors import CheckpointError

_SPACE = "\u2581"


class _Type(IntEnum):
    """``type`` of a piece in sentencepiece_model.proto."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class _Model:
    """What of sentencepiece_model.proto decides ids."""

    pieces: list[tuple[str, float, int]]
    """Text, score and type of each."""
    model_type: int
    """1 unigram, 2 BPE."""
    byte_fallback: bool
    space_is_suffix: bool
    charsmap: bytes
    add_dummy_prefix: bool
    remove_extra_spaces: bool
    escape_spaces: bool


def tokenizer_of_sentencepiece(path: Path) -> Any:
    """A ``tokenizers.Tokenizer`` of a SentencePiece model, without BOS and EOS around texts.

    Raises:
        CheckpointError: a kind of model that tokenizer.json has no words for.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    model = _read_model(path)
    vocab = {piece: index for index, (piece, _, _) in enumerate(model.pieces)}
    unknown = next((piece for piece, _, kind in model.pieces if kind == _Type.UNKNOWN), None)
    core: Any
    if model.model_type == 1:
        scores = [(piece, score) for piece, score, _ in model.pieces]
        core = models.Unigram(scores, None if unknown is None else vocab[unknown], model.byte_fallback)
    else:
        merges = _merges(model, vocab)
        core = models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=model.byte_fallback)
    tokenizer = Tokenizer(core)
    steps: list[Any] = [normalizers.Precompiled(model.charsmap)] if model.charsmap else []
    if model.remove_extra_spaces:
        steps += [normalizers.Replace(Regex("^ +| +$"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if model.add_dummy_prefix:
        steps.append(normalizers.Prepend(_SPACE))
    steps.append(normalizers.Replace(" ", _SPACE))
    tokenizer.normalizer = normalizers.Sequence(steps)
    defined = sorted((piece for piece, _, kind in model.pieces if kind == _Type.USER_DEFINED), key=len, reverse=True)
    if defined:
        pattern = "|".join("".join(f"\\x{{{ord(char):x}}}" for char in piece) for piece in defined)
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    parts = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if model.add_dummy_prefix:
        parts.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(parts)
    special = [piece for piece, _, kind in model.pieces if kind in (_Type.UNKNOWN, _Type.CONTROL)]
    tokenizer.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in special])
    return tokenizer


def _merges(model: _Model, vocab: dict[str, int]) -> list[tuple[str, str]]:
    """Pairs in the order in which SentencePiece joins them: by the score of what they become."""
    normal = {piece for piece, _, kind in model.pieces if kind == _Type.NORMAL}
    ranked = []
    for piece in normal:
        score = model.pieces[vocab[piece]][1]
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in normal and right in normal:
                ranked.append((-score, vocab[piece], vocab[left], vocab[right], left, right))
    return [(left, right) for *_, left, right in sorted(ranked)]


def _read_model(path: Path) -> _Model:
    try:
        top = list(_fields(path.read_bytes()))
        pieces = [_piece(value) for number, value in top if number == 1]
        trainer = _settings(top, 2)
        normalizer = _settings(top, 3)
    except (ValueError, IndexError, KeyError, struct.error, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: not a SentencePiece model ({error})") from error
    model = _Model(
        pieces=pieces,
        model_type=trainer.get(3, 1),
        byte_fallback=bool(trainer.get(35, False)),
        space_is_suffix=bool(trainer.get(24, False)),
        charsmap=bytes(normalizer.get(2, b"")),
        add_dummy_prefix=bool(normalizer.get(3, True)),
        remove_extra_spaces=bool(normalizer.get(4, True)),
        escape_spaces=bool(normalizer.get(5, True)),
    )
    reason = None
    if model.model_type not in (1, 2):
        reason = "it is neither a unigram nor a BPE model"
    elif model.space_is_suffix or not model.escape_spaces:
        reason = "it marks spaces in a way of its own"
    elif any(kind == _Type.UNUSED for _, _, kind in pieces):
        reason = "it has unused pieces"
    if reason is not None:
        raise CheckpointError(
            f"{path}: cannot be written as a tokenizer.json ({reason}); give --tokenizer with the model's own one"
        )
    return model


def _settings(top: list[tuple[int, Any]], number: int) -> dict[int, Any]:
    return {field: value for where, content in top if where == number for field, value in _fields(content)}


def _piece(content: bytes) -> tuple[str, float, int]:
    fields = dict(_fields(content))
    score = struct.unpack("<f", fields[2])[0] if 2 in fields else 0.0
    return fields[1].decode(), score, fields.get(3, _Type.NORMAL)


def _fields(content: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of the fields of a protocol buffer; integers, and bytes for all else."""
    place = 0
    while place < len(content):
        key, place = _varint(content, place)
        kind = key & 7
        if kind == 0:
            value: Any
            value, place = _varint(content, place)
        else:
            if kind == 2:
                size, place = _varint(content, place)
            else:
                size = {1: 8, 5: 4}[kind]
            value, place = content[place : place + size], place + size
            if place > len(content):
                raise ValueError("it is cut short")
        yield key >> 3, value


def _varint(content: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = content[place]
        value |= (byte & 127) << shift
        place, shift = place + 1, shift + 7
        if byte < 128:
            return value, place
