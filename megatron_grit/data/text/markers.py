"""Tokens that tell queries from passages: SGPT's brackets, and a token for each side.

They are put in as ids when a record is read, so that no indexed file is built again and no bracket merges with the text
beside it:

=============  ===============================  ===================================
               query                            passage
=============  ===============================  ===================================
specb          ``[ text ]``                     ``{ text }``, of the vocabulary
speca          ``[SOS] text [EOS]``             ``{SOS} text {EOS}``, new tokens
side tokens    ``[QRY]`` before all this        ``[DOC]``, new tokens
=============  ===============================  ===================================

An instruction stands before them. They are attended and pooled.

Source: Muennighoff, SGPT: GPT Sentence Embeddings for Semantic Search (arXiv 2202.08904), and its repository.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_grit.config.schema import EmbeddingConfig
from megatron_grit.data.text.tokenizer import Tokenizer
from megatron_grit.errors import ConfigError

Side = Literal["query", "passage"]
"""What a text is to be embedded as."""

_BRACKETS = {
    "none": ((), ()),
    "specb": (("[", "]"), ("{", "}")),
    "speca": (("[SOS]", "[EOS]"), ("{SOS}", "{EOS}")),
}
"""Around queries and around passages."""
_SIDES = ("[QRY]", "[DOC]")


@dataclass(frozen=True, slots=True)
class TextMarkers:
    """Ids in front of a text and behind it."""

    opening: tuple[int, ...] = ()
    closing: tuple[int, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Tokens that a text becomes longer by."""
        return len(self.opening) + len(self.closing)


NO_MARKERS = TextMarkers()


@dataclass(frozen=True, slots=True)
class SideMarkers:
    """The markers of queries and passages; as many tokens for both."""

    query: TextMarkers = NO_MARKERS
    passage: TextMarkers = NO_MARKERS


def load_markers(embedding: EmbeddingConfig, model_vocab_size: int | None, tokenizer: Tokenizer) -> SideMarkers:
    """What ``embedding.brackets`` and ``embedding.side_tokens`` put around texts.

    A new token has the id that the tokenizer gives its name, if that is a special token there, else the first ids after
    the tokenizer's last.

    Args:
        embedding: the section of the configuration.
        model_vocab_size: ``model.vocab_size``.
        tokenizer: the run's.

    Raises:
        ConfigError: the vocabulary has no such token, or no room for new ones.
    """
    brackets = _BRACKETS[embedding.brackets]
    sides = [(name,) if embedding.side_tokens else () for name in _SIDES]
    found: dict[str, int] = {}
    wanted = [name for side in sides for name in side]
    if embedding.brackets == "specb":
        found = {name: _single_token(tokenizer, name) for pair in brackets for name in pair}
    else:
        # Brackets first: their ids stay where they are when side tokens are added.
        wanted = [*brackets[0], *brackets[1], *wanted]
    found |= _new_tokens(wanted, model_vocab_size, tokenizer)
    query, passage = (
        TextMarkers(tuple(found[name] for name in (*side, *pair[:1])), tuple(found[name] for name in pair[1:]))
        for side, pair in zip(sides, brackets, strict=True)
    )
    return SideMarkers(query, passage)


def _single_token(tokenizer: Tokenizer, name: str) -> int:
    """The vocabulary's own token of a bracket: the last one of its spelling, which may begin with a space."""
    ids = tokenizer.encode(name)
    if not ids or tokenizer.decode(ids[-1:]).strip() != name:
        raise ConfigError(
            f"embedding.brackets specb: the tokenizer {tokenizer.path} has no token for {name!r}; set "
            "embedding.brackets to speca, or use another tokenizer"
        )
    return ids[-1]


def _new_tokens(names: list[str], model_vocab_size: int | None, tokenizer: Tokenizer) -> dict[str, int]:
    found = {name: tokenizer.special_tokens[name] for name in names if name in tokenizer.special_tokens}
    missing = [name for name in names if name not in found]
    first, size = tokenizer.vocab_size, model_vocab_size or tokenizer.vocab_size
    if missing and first + len(missing) > size:
        keys = "embedding.side_tokens" if missing[0] in _SIDES else "embedding.brackets speca"
        raise ConfigError(
            f"{keys}: the new tokens {' '.join(missing)} have the ids from {first} on, and the model's vocabulary has "
            f"{size}; set model.vocab_size to {first + len(missing)} or more"
        )
    return found | {name: first + place for place, name in enumerate(missing)}
