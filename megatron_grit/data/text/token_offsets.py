"""Which characters each token of a text stands for, for whole batches at the speed of the bare tokenizer.

Asking a tokenizer for offsets costs a quarter to a whole tokenisation more. A tokenizer that changes nothing in the
text, byte-level or with byte fallback, needs no asking: the characters of a token can be read from its spelling, once
for the vocabulary, and the offsets of a batch are a running sum. The sum has to come out at the length of the text;
where it does not, or where the tokenizer normalises, that text's offsets are asked for.
"""

from __future__ import annotations

import json
import unicodedata
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

_UNKNOWN = -(1 << 40)
"""Width of a token whose characters cannot be read from its spelling: no sum with it comes out right."""
_SPACE = "▁"
_NORMALISED = "a  b\t c \n ﬁ Å ２ \u00a0x\u200b "
"""Text that every normaliser in use changes."""

Offsets = list[tuple[int, int]]


@dataclass(frozen=True)
class EncodedTexts:
    """Tokens of several texts, one after another."""

    ids: np.ndarray
    """int32 [num_tokens]."""
    lengths: np.ndarray
    """int64 [num_texts]: tokens of each text."""
    begins: np.ndarray
    """int64 [num_tokens]: first character of each token, counted in its own text."""
    ends: np.ndarray
    """int64 [num_tokens]: one past its last character. Not greater than ``begins`` where no character is its own."""
    covered: np.ndarray
    """bool [num_texts]: every character belongs to a token. Texts without it have to be looked at."""


@dataclass(frozen=True)
class PieceWidths:
    """Characters that the tokens of a vocabulary stand for."""

    chars: np.ndarray
    """int64 [vocab_size]: characters that begin in the token."""
    continues: np.ndarray
    """int64 [vocab_size]: 1 where the first byte continues a character that began in the token before."""
    spaced: np.ndarray
    """bool [vocab_size]: the first character is a space, which the tokenizer may have put in front of the text."""
    unchanged: Callable[[str], bool]
    """Whether the tokenizer's normaliser leaves a text as it is."""


def flatten(encoded: Iterable[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Ids of several texts in one array, int32, and the tokens of each, int64."""
    flat, lengths = array("i"), array("q")
    for ids in encoded:
        flat.fromlist(ids)
        lengths.append(len(ids))
    return np.frombuffer(flat, dtype=np.int32), np.frombuffer(lengths, dtype=np.int64)


def encode_with_widths(
    texts: Sequence[str],
    ids: np.ndarray,
    lengths: np.ndarray,
    widths: PieceWidths | None,
    ask: Callable[[str], tuple[list[int], Offsets]],
) -> EncodedTexts:
    """Tokens of texts with their characters.

    Args:
        texts: the texts.
        ids: int32 [num_tokens], those of all texts.
        lengths: int64 [num_texts], tokens of each text.
        widths: of the vocabulary; None where spellings do not tell.
        ask: ids and offsets of one text, from the tokenizer itself.
    """
    starts = np.cumsum(lengths) - lengths
    begins, ends = np.zeros(len(ids), dtype=np.int64), np.zeros(len(ids), dtype=np.int64)
    sizes = np.fromiter(map(len, texts), dtype=np.int64, count=len(texts))
    known = np.zeros(len(texts), dtype=bool)
    if widths is not None and len(ids):
        known = _sum_widths(ids, lengths, starts, sizes, widths, begins, ends)
        known &= np.fromiter(map(widths.unchanged, texts), dtype=bool, count=len(texts))
    covered = known | (sizes == 0)
    for index in np.flatnonzero(~covered).tolist():
        start, count = int(starts[index]), int(lengths[index])
        _, offsets = ask(texts[index])
        pairs = np.asarray(offsets, dtype=np.int64).reshape(-1, 2)
        if len(pairs) != count:
            raise ValueError("a tokenizer that gives other ids for one text than for a batch")
        begins[start : start + count], ends[start : start + count] = pairs.T
    return EncodedTexts(ids, lengths, begins, ends, covered)


def _sum_widths(
    ids: np.ndarray,
    lengths: np.ndarray,
    starts: np.ndarray,
    sizes: np.ndarray,
    widths: PieceWidths,
    begins: np.ndarray,
    ends: np.ndarray,
) -> np.ndarray:
    """Fill ``begins`` and ``ends``; bool [num_texts]: the sum came out."""
    chars = widths.chars[ids]
    first = starts[lengths > 0]
    running = np.cumsum(chars)
    totals = np.zeros(len(lengths), dtype=np.int64)
    totals[lengths > 0] = np.add.reduceat(chars, first)
    spaced = np.zeros(len(lengths), dtype=bool)
    spaced[lengths > 0] = widths.spaced[ids[first]]
    extra = (totals == sizes + 1) & spaced  # the space in front is the tokenizer's
    before = np.concatenate(([0], running))[starts]
    base = np.repeat(before + extra, lengths)
    np.maximum(running - chars - widths.continues[ids] - base, 0, out=begins)
    np.maximum(running - base, 0, out=ends)
    return (totals == sizes) | extra


def _unchanged(text: str) -> bool:
    return True


def _is_nfc(text: str) -> bool:
    return unicodedata.is_normalized("NFC", text)


def sentencepiece_widths(processor: Any) -> PieceWidths | None:
    """Widths of a SentencePiece model; None for one that normalises."""
    if processor.normalize(_NORMALISED).replace(_SPACE, " ").lstrip(" ") != _NORMALISED:
        return None
    size = processor.get_piece_size()
    pieces = [processor.id_to_piece(index) for index in range(size)]
    bytes_of = {index: bytes([int(piece[3:5], 16)]) for index, piece in enumerate(pieces) if processor.is_byte(index)}
    unknown = {index for index in range(size) if processor.is_unknown(index) or processor.is_control(index)}
    return _widths([bytes_of.get(i) or piece.replace(_SPACE, " ").encode() for i, piece in enumerate(pieces)], unknown)


def json_widths(backend: Any) -> PieceWidths | None:
    """Widths of a tokenizer of the tokenizers library; None for one that normalises, or spells in its own way."""
    parts = [_state(part) for part in (backend.normalizer, backend.pre_tokenizer, backend.decoder)]
    normaliser, splitter, decoder = parts
    vocabulary = backend.get_vocab(with_added_tokens=True)
    spelling: list[bytes | None] = [None] * (max(vocabulary.values()) + 1)
    if "ByteLevel" in _types(splitter) and _types(normaliser) <= {"NFC", "Sequence"}:
        alphabet = _byte_alphabet()
        unchanged = _is_nfc if "NFC" in _types(normaliser) else _unchanged
        for token, index in vocabulary.items():
            known = all(character in alphabet for character in token)
            spelling[index] = bytes(alphabet[character] for character in token) if known else None
    elif "ByteFallback" in _types(decoder) and _types(normaliser) <= {"Prepend", "Replace", "Sequence"}:
        unchanged = _unchanged
        for token, index in vocabulary.items():
            byte = len(token) == 6 and token.startswith("<0x") and token.endswith(">")
            spelling[index] = bytes([int(token[3:5], 16)]) if byte else token.replace(_SPACE, " ").encode()
    else:
        return None
    for index, token in backend.get_added_tokens_decoder().items():
        spelling[index] = None if token.special else token.content.encode()
    unknown = {index for index, content in enumerate(spelling) if content is None}
    unk = getattr(backend.model, "unk_token", None)
    unknown |= {vocabulary[unk]} if unk in vocabulary else set()
    return _widths([content or b"" for content in spelling], unknown, unchanged)


def _widths(spelling: list[bytes], unknown: set[int], unchanged: Callable[[str], bool] = _unchanged) -> PieceWidths:
    chars = np.array([sum(byte & 0xC0 != 0x80 for byte in content) for content in spelling], dtype=np.int64)
    chars[list(unknown)] = _UNKNOWN
    continues = np.array([content[:1] >= b"\x80" and content[0] & 0xC0 == 0x80 for content in spelling], dtype=np.int64)
    spaced = np.array([content.startswith(b" ") for content in spelling], dtype=bool)
    return PieceWidths(chars, continues, spaced, unchanged)


def _state(part: Any) -> Any:
    return None if part is None else json.loads(part.__getstate__())


def _types(state: Any) -> set[str]:
    """Names of a component and of those in it."""
    if isinstance(state, dict):
        own = {state["type"]} if isinstance(state.get("type"), str) else set()
        return own.union(*map(_types, state.values()))
    return set().union(*map(_types, state)) if isinstance(state, list) else set()


def _byte_alphabet() -> dict[str, int]:
    """The characters with which byte-level vocabularies spell the 256 bytes: printable Latin-1 characters stand for
    themselves, the others follow from U+0100 in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in set(printable)]
    return alphabet | {chr(0x100 + place): byte for place, byte in enumerate(others)}
