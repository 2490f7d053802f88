"""Tokenizers: a SentencePiece model or a tokenizer.json, behind one small interface.

No special token is ever read from text: ``</s>`` in a document is three or four ordinary pieces. BOS and EOS are
added as ids by :mod:`megatron_grit.data.text.templates`.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import io
import json
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_grit.config.options import SentencePieceTraining
from megatron_grit.data.text.special_finder import SpecialFinder, special_finder
from megatron_grit.data.text.token_offsets import (
    EncodedTexts,
    PieceWidths,
    encode_with_widths,
    flatten,
    json_widths,
    sentencepiece_widths,
)
from megatron_grit.data.text.tokenizer_settings import added_tokens, read_settings, token_name, tokens_of_pieces
from megatron_grit.data.text.word_cache import WordCache, word_cache
from megatron_grit.errors import DataError
from megatron_grit.store.files import replacing
from megatron_grit.store.hub import local_folder
from megatron_grit.store.logs import get_logger

log = get_logger(__name__)

CHAT_FILE = "chat.json"
"""How the model of a checkpoint converses; see :mod:`megatron_grit.data.chat.chat`."""
BESIDE_TOKENIZER = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    CHAT_FILE,
)
"""Files that go with a tokenizer's file: which of its tokens are special, and how conversations are written."""
_MODEL_NAMES = ("tokenizer.model", "tokenizer.json")
_BOS_NAMES = ("<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>", "[BOS]", "[CLS]", "<|endoftext|>")
_EOS_NAMES = ("</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>", "<|im_end|>", "[EOS]", "[SEP]")
_PROBES = (
    "",
    " a  b   c\n\n d\t\r\n",
    "It's 12,345.678e-9 o'clock; e\u0301 \u00e9 \ufb01 \u2460 \u00a0 \u2003 \u200b x",
    "\u6f22\u5b57\u304b\u306a \ud55c\uad6d \u0627\u0644 \U0001f600\u200d \0 \x7f",
    "def f(x):\n    return {'a': [x ** 2, 0xFF]}  # " + "=" * 61,
)
"""Texts on which two tokenizers are compared."""


class Tokenizer(ABC):
    """Text to token ids and back.

    Attributes:
        path: the file that was read.
        fingerprint: SHA-256 of that file, in hexadecimal, and of begin, end and special tokens where those of a
            SentencePiece model are changed by the files beside it. Indexed files carry it.
        vocab_size: one more than the largest id.
        bos_id: begin of sequence.
        eos_id: end of sequence.
        pad_id: padding; the end of sequence where the tokenizer has none.
        special_tokens: ids of the tokens that no text is ever read as, by name.
        lstrip: ids of those that take the white space before them.
        rstrip: ids of those that take the white space behind them.
        single_word: ids of those that are text where a letter, digit or underscore stands beside them.
        normalized: ids of those that are looked for in normalised text, and end its normalisation.
    """

    path: Path
    fingerprint: str
    vocab_size: int
    bos_id: int
    eos_id: int
    pad_id: int
    special_tokens: dict[str, int]
    lstrip: frozenset[int] = frozenset()
    rstrip: frozenset[int] = frozenset()
    single_word: frozenset[int] = frozenset()
    normalized: frozenset[int] = frozenset()
    find_special: SpecialFinder | None = None
    """Special tokens of a string as the library finds them, where names alone do not tell: some are looked for in
    normalised text, or other added tokens hold their names."""

    def _take_special(self, tokens: Mapping[int, Any]) -> None:
        """Special tokens, and which of them have a property, of ``tokenizers.AddedToken`` by id."""
        self.special_tokens = {token.content: index for index, token in tokens.items()}
        self.lstrip = frozenset(index for index, token in tokens.items() if token.lstrip)
        self.rstrip = frozenset(index for index, token in tokens.items() if token.rstrip)
        self.single_word = frozenset(index for index, token in tokens.items() if token.single_word)

    @property
    def after_special(self) -> Tokenizer:
        """The tokenizer of text that follows a special token: without the space that is put before a string's
        first word alone."""
        return self

    @property
    def after_normalized(self) -> Tokenizer:
        """The tokenizer of text that follows one of :attr:`normalized`: without what a normaliser puts in front."""
        return self.after_special

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Ids of ``text``, without BOS or EOS."""

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text: equal to :meth:`encode` of each."""

    def encode_batch_arrays(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of all texts in one array, int32 [num_tokens], and the tokens of each text, int64 [num_texts]."""
        return flatten(self.encode_batch(texts))

    @abstractmethod
    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of ``text``, and the half-open range of characters that each of them stands for.

        The range is empty for a token that no character of its own belongs to: a space that the tokenizer puts in
        front, or the first bytes of a character that is spelled in bytes.
        """

    def encode_batch_with_offsets(self, texts: Sequence[str]) -> EncodedTexts:
        """Ids of each text, equal to :meth:`encode` of each, and the characters that each id stands for."""
        ids, lengths = self.encode_batch_arrays(texts)
        return encode_with_widths(texts, ids, lengths, self._piece_widths, self.encode_with_offsets)

    @property
    @abstractmethod
    def _piece_widths(self) -> PieceWidths | None:
        """Characters of each id; None where offsets have to be asked for."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``; special tokens are left out."""

    @abstractmethod
    def id_to_token(self, index: int) -> str:
        """The vocabulary's own spelling of an id."""


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece ``.model`` file, with the space in front of the text that the model asks for.

    Special and added tokens, and which of them are BOS, EOS and padding, are those of the files beside it too, where
    ``beside`` is true, as in transformers.
    """

    def __init__(self, path: Path, beside: bool = True) -> None:
        import sentencepiece

        self.path = path
        content = path.read_bytes()
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(content)
        except RuntimeError as error:
            raise DataError("not a SentencePiece model", path=path) from error
        size = self._processor.get_piece_size()
        settings = read_settings(path) if beside else {}
        self.added_tokens = tokens_of_pieces(path, settings, self._processor)
        self.vocab_size = max([size - 1, *self.added_tokens]) + 1
        self._beyond = {index: token.content for index, token in self.added_tokens.items() if index >= size}
        self._left_out = {i for i in self.added_tokens if i >= size or not self._processor.is_control(i)}
        self._take_special(self.added_tokens)
        self.bos_id = self._find("bos_token", settings, self._processor.bos_id())
        self.eos_id = self._find("eos_token", settings, self._processor.eos_id())
        if self.bos_id < 0 or self.eos_id < 0:
            raise DataError("the model has no BOS or no EOS piece; GRIT's templates need both", path=path)
        pad = token_name(settings.get("pad_token"))
        pad_id = self._processor.pad_id() if pad is None else self._id_of(pad)
        self.pad_id = self.eos_id if pad_id < 0 else pad_id
        self.fingerprint = hashlib.sha256(content + self._changed_beside()).hexdigest()

    def _changed_beside(self) -> bytes:
        """What the files beside the model change of its ids. Nothing: data are those of the model alone."""
        own, ends = [self._processor.bos_id(), self._processor.eos_id()], [self.bos_id, self.eos_id]
        added = {i: self.added_tokens[i].content for i in sorted(self._left_out - {*own, self._processor.unk_id()})}
        return json.dumps([ends, added]).encode() if added or ends != own else b""

    def _find(self, key: str, settings: dict[str, Any], own: int) -> int:
        name = token_name(settings.get(key))
        if name is None:
            return own
        if (index := self._id_of(name)) < 0:
            what = (
                f"{key} of the files beside it is {name!r}, which is neither a piece of this model nor an added token"
            )
            raise DataError(f"{what}; its own has id {own}", path=self.path)
        return index

    def _id_of(self, name: str) -> int:
        """Of a piece or an added token; -1: there is none."""
        index = self.special_tokens.get(name, self._processor.piece_to_id(name))
        return index if self.id_to_token(index) == name else -1

    @functools.cached_property
    def _piece_widths(self) -> PieceWidths | None:
        return sentencepiece_widths(self._processor)

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self._processor.encode(list(texts), num_threads=1)

    def encode_batch_arrays(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        arrays = self._processor.encode(list(texts), num_threads=1, return_type="numpy")
        lengths = np.fromiter(map(len, arrays), dtype=np.int64, count=len(arrays))
        return np.concatenate([np.empty(0, dtype=np.int32), *arrays], dtype=np.int32), lengths

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        encoded = self._processor.encode(text, return_type="offset_mapping")
        return encoded["ids"], [(int(begin), int(end)) for begin, end in encoded["offsets"]]

    def decode(self, ids: Sequence[int]) -> str:
        return self._processor.decode([int(index) for index in ids if index not in self._left_out])

    def id_to_token(self, index: int) -> str:
        return self._beyond.get(int(index)) or self._processor.id_to_piece(int(index))


class JsonTokenizer(Tokenizer):
    """A ``tokenizer.json`` of the tokenizers library.

    BOS, EOS and padding come from ``tokenizer_config.json`` and its companions beside it (:func:`read_settings`), else
    from the names in common use. Tokens of ``added_tokens_decoder`` are added, and their properties hold where
    tokenizer.json has others, as in transformers.
    """

    def __init__(self, path: Path) -> None:
        import tokenizers

        self.path = path
        self.fingerprint = hashlib.sha256(path.read_bytes()).hexdigest()
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise DataError(f"not a tokenizer.json: {error}", path=path) from error
        self._tokenizer.encode_special_tokens = True  # a special token's name in a text is text
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        settings = read_settings(self.path)
        there = {token.content for token in self._tokenizer.get_added_tokens_decoder().values()}
        self._tokenizer.add_tokens(list(added_tokens(self.path, settings, there).values()))
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.bos_id = self._find("bos_token", settings, _BOS_NAMES)
        self.eos_id = self._find("eos_token", settings, _EOS_NAMES)
        pad = token_name(settings.get("pad_token"))
        pad_id = None if pad is None else self._tokenizer.token_to_id(pad)
        self.pad_id = self.eos_id if pad_id is None else pad_id
        added = self._tokenizer.get_added_tokens_decoder()
        special = {index: token for index, token in added.items() if token.special}
        self._take_special(special)
        if self._tokenizer.normalizer is not None:
            self.normalized = frozenset(index for index, token in special.items() if token.normalized)

    @functools.cached_property
    def find_special(self) -> SpecialFinder | None:  # type: ignore[override]
        return special_finder(self.backend(), {self.bos_id, self.eos_id})

    @functools.cached_property
    def after_special(self) -> Tokenizer:
        state = json.loads(self._tokenizer.to_str())
        splitters = state["pre_tokenizer"] or {}
        first = [
            part
            for part in (splitters, *(splitters.get("pretokenizers") or ()))
            if part.get("type") == "Metaspace" and part.get("prepend_scheme") == "first"
        ]
        if not first:
            return self
        for part in first:
            part["prepend_scheme"] = "never"
        return self._with_state(state)

    @functools.cached_property
    def after_normalized(self) -> Tokenizer:
        after = self.after_special
        assert isinstance(after, JsonTokenizer)
        state = json.loads(after._tokenizer.to_str())
        normalizer = state["normalizer"] or {}
        parts = normalizer["normalizers"] if normalizer.get("type") == "Sequence" else [normalizer]
        kept = [part for part in parts if part.get("type") != "Prepend"]
        if len(kept) == len(parts):
            return after
        state["normalizer"] = {"type": "Sequence", "normalizers": kept}
        for token in state["added_tokens"]:  # what was put in front of their names is still looked for
            if token["normalized"] and not token["special"]:
                token["content"] = self._tokenizer.normalizer.normalize_str(token["content"])
        return after._with_state(state)

    def _with_state(self, state: dict[str, Any]) -> JsonTokenizer:
        """This tokenizer with another description in the library."""
        import tokenizers

        other = copy.copy(self)
        for cached in ("_piece_widths", "_words"):
            other.__dict__.pop(cached, None)
        other._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(state))
        other._tokenizer.encode_special_tokens = True
        return other

    @functools.cached_property
    def _piece_widths(self) -> PieceWidths | None:
        return json_widths(self._tokenizer)

    @functools.cached_property
    def _words(self) -> WordCache | None:
        return word_cache(json.loads(self.path.read_bytes()), self.backend(), self.encode)

    def encode_batch_arrays(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        words = self._words
        return super().encode_batch_arrays(texts) if words is None or not words.pays() else words.encode(texts)

    def _find(self, key: str, settings: dict[str, Any], names: Sequence[str]) -> int:
        named = token_name(settings.get(key))
        for name in [named] if named is not None else names:
            index = self._tokenizer.token_to_id(name)
            if index is not None:
                return index
        raise DataError(f"no {key}; name it in tokenizer_config.json beside this file", path=self.path)

    def backend(self) -> Any:
        """A ``tokenizers.Tokenizer`` of its own that reads texts likewise, but for the names of special tokens, which
        it reads as these."""
        import tokenizers

        return tokenizers.Tokenizer.from_str(self._tokenizer.to_str())

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        # "fast" leaves out the offsets, and changes no id.
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode([int(index) for index in ids], skip_special_tokens=True)

    def id_to_token(self, index: int) -> str:
        return self._tokenizer.id_to_token(int(index)) or f"<{index}>"


def copy_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Put a tokenizer into a folder: its file as tokenizer.model or tokenizer.json, and what says which of its tokens
    are special and how it writes a conversation.

    Raises:
        OSError: a file cannot be read or written.
    """
    shutil.copyfile(tokenizer.path, folder / f"tokenizer{tokenizer.path.suffix}")
    for name in BESIDE_TOKENIZER:
        beside = tokenizer.path.with_name(name)
        if beside.is_file():
            shutil.copyfile(beside, folder / name)


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """Read a tokenizer.

    Args:
        path: a SentencePiece ``.model`` file, a ``tokenizer.json``, a folder with one of both, or a model's
            name on the hub. Where both are there and differ, ``tokenizer.json`` is taken, as by transformers.

    Raises:
        CheckpointError: the hub cannot give it.
        DataError: no such file, or not a tokenizer.
    """
    path = local_folder(os.fspath(path), weights=False)
    if path.is_dir():
        found = [path / name for name in _MODEL_NAMES if (path / name).is_file()]
        if not found:
            raise DataError(f"no {' or '.join(_MODEL_NAMES)} in this folder", path=path)
        if len(found) == 2:
            return _load_either(*found)
        (path,) = found
    if not path.is_file():
        raise DataError("no such tokenizer", path=path)
    return JsonTokenizer(path) if path.suffix == ".json" else SentencePieceTokenizer(path)


def _load_either(model: Path, json_file: Path) -> Tokenizer:
    """The tokenizer of a folder with two: ``tokenizer.json``, as in transformers, unless ``tokenizer.model`` alone
    gives the same ids: then that one, whose fingerprint earlier data has."""
    preferred = JsonTokenizer(json_file)
    try:
        if are_same_tokenizers(preferred, SentencePieceTokenizer(model, beside=False)):
            return SentencePieceTokenizer(model)
    except DataError:
        return preferred
    log.info(f"{json_file}: counts before {model.name}, which gives other ids")
    return preferred


def are_same_tokenizers(one: Tokenizer, other: Tokenizer) -> bool:
    """Whether two tokenizers have the same vocabulary and special tokens, and read some texts as the same ids."""
    facts = [(each.vocab_size, each.bos_id, each.eos_id, each.pad_id) for each in (one, other)]
    return (
        facts[0] == facts[1]
        and all(one.id_to_token(index) == other.id_to_token(index) for index in range(one.vocab_size))
        and all(one.encode(text) == other.encode(text) for text in _PROBES)
        and all(one.after_special.encode(text) == other.after_special.encode(text) for text in _PROBES)
    )


def train_sentencepiece(
    texts: Iterable[str],
    output_prefix: str | os.PathLike[str],
    vocab_size: int,
    *,
    model_type: str = "bpe",
    character_coverage: float = 0.9995,
    max_text_chars: int = 4096,
) -> Path:
    """Train a SentencePiece model whose ids GRIT's templates can rely on.

    ids: 0 ``<unk>``, 1 ``<s>``, 2 ``</s>``, 3 newline, then 256 bytes, then pieces. Characters outside the
    vocabulary are spelled in bytes, nothing is normalised, and runs of spaces are kept, so that text comes back as it
    was. A newline is always a token of its own, hence no token reaches across the end of a template line.
    The same texts in the same order give the same file.

    Args:
        texts: training texts.
        output_prefix: the model is written to ``<output_prefix>.model``.
        vocab_size: number of pieces.
        model_type: "bpe" or "unigram".
        character_coverage: share of the characters that get pieces of their own.
        max_text_chars: longer texts are cut into pieces of this many characters for training.

    Returns:
        Path of the model.

    Raises:
        DataError: no text, or too little of it for ``vocab_size``.
        ConfigError: ``vocab_size`` has no room for the bytes, or another value is none.
    """
    import sentencepiece

    SentencePieceTraining(
        vocab_size=vocab_size,
        model_type=model_type,  # type: ignore[arg-type]
        character_coverage=character_coverage,
        max_text_chars=max_text_chars,
    )
    pieces = [piece for text in texts for piece in _training_pieces(text, max_text_chars)]
    if not pieces:
        raise DataError("no text to train a tokenizer on; give files that hold some")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(pieces),
            model_writer=model,
            vocab_size=vocab_size,
            model_type=model_type,
            character_coverage=character_coverage,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            user_defined_symbols=["\n"],
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            max_sentence_length=4 * max_text_chars + 16,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise DataError(f"SentencePiece could not train {vocab_size} pieces on this text: {reason}") from error
    path = Path(f"{os.fspath(output_prefix)}.model")
    with replacing(path, "wb") as file:
        file.write(model.getvalue())
    return path


def _training_pieces(text: str, max_chars: int) -> list[str]:
    """The text, cut to the trainer's longest sentence. Lines stay together: the word after a newline has no space."""
    text = text.replace("\0", "")
    return [text[start : start + max_chars] for start in range(0, len(text), max_chars) if text.strip()]
