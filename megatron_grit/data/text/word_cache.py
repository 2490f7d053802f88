"""Tokens of words that were seen before: several times faster than a tokenizer, with the same ids.

A byte-level BPE tokenizer first cuts a text into words by a regular expression and then tokenises each word alone. None
of the expressions in :data:`_SAFE_PATTERNS` has a word that goes on with a space after a character that is not white
space. Before every such space a new word begins, whatever came before, so that a text can be cut there and the parts
can be tokenised on their own. Parts repeat; a dictionary remembers their ids.

Which characters are white space differs between Unicode versions and libraries. Cutting less than possible is always
right, so everything that any of them calls white space counts as such here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

CAPACITY = 1 << 16
"""Words that are remembered, about 15 MB of them; then the cache begins anew."""
_MAX_CHARS = 64  # longer parts hardly ever repeat: text without spaces, base64

# The space comes first in the expressions because that is what can be searched for fast.
_CUT = re.compile(" (?<=[^\\s\u180e\u200b] )")
_UNCUT = re.compile(" (?<=[\\s\u180e\u200b] )")
"""A space at which must not be cut."""

_WARM_CHARS = 1 << 20  # seen before the cache is judged
_MOST_NEW = (
    0.4  # share of a call's characters in parts that were not known: above it the cache costs more than it saves
)
_PAUSE = 15  # calls without the cache before it is tried again

_JOINED_CHARS = 1 << 15  # what is tokenised in one call

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SAFE_PATTERNS = {
    _CONTRACTIONS + r"\p{N}{1,3}" + _REST,  # cl100k, Llama 3
    _CONTRACTIONS + r"\p{N}" + _REST,  # Qwen 2 and later
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",  # GPT-2; ByteLevel's own
}


SEPARATOR = "\0megatron_grit separator\0"
_TRICKY_TEXT = (
    " two  three   four    spaces\n after\n   a\tline  \n \u00a0 and \u2003wide  ones, "
    "it's  12 345.6 \u180e x\u200b y' s...  \r\n end   "
)


def word_cache(description: dict[str, Any], separating: Any, encode: Callable[[str], list[int]]) -> WordCache | None:
    """A cache in front of a tokenizer, where that changes no id. None: it would.

    Args:
        description: its ``tokenizer.json``, parsed.
        separating: a ``tokenizers.Tokenizer`` of its own, because one that knows the separator finds it in texts too.
        encode: the tokenizer.
    """
    from tokenizers import AddedToken

    if not cuts_at_spaces(description):
        return None
    separating.encode_special_tokens = True
    separating.add_tokens([AddedToken(SEPARATOR, special=False, normalized=False)])
    words = WordCache(
        lambda text: separating.encode_batch_fast([text], add_special_tokens=False)[0].ids,
        SEPARATOR,
        separating.get_vocab(with_added_tokens=True)[SEPARATOR],
        encode,
    )
    # Should a version of the library cut texts in another way, then no cache.
    ids, _ = words.encode([_TRICKY_TEXT])
    return words if ids.tolist() == encode(_TRICKY_TEXT) else None


def cuts_at_spaces(description: dict[str, Any]) -> bool:
    """Whether a ``tokenizer.json``, parsed, describes a tokenizer whose texts can be cut at spaces.

    That is byte-level BPE with one of the expressions above, with nothing before it that looks across a space.
    """
    model, normalizer = description.get("model") or {}, description.get("normalizer")
    if model.get("type") != "BPE" or model.get("dropout"):
        return False
    if normalizer is not None and normalizer.get("type") != "NFC":  # a space never composes with what is before it
        return False
    for token in description.get("added_tokens") or []:
        # Special tokens are not looked for in texts. The others are, and may swallow the space around them.
        plain = not (token.get("lstrip") or token.get("rstrip") or token.get("single_word"))
        if not token.get("special") and (" " in token["content"] or not plain):
            return False
    return _pre_tokenizer_cuts(description.get("pre_tokenizer") or {})


def _pre_tokenizer_cuts(description: dict[str, Any]) -> bool:
    steps = description.get("pretokenizers", []) if description.get("type") == "Sequence" else [description]
    if not steps or steps[-1].get("type") != "ByteLevel" or steps[-1].get("add_prefix_space"):
        return False
    if len(steps) == 1:
        return steps[0].get("use_regex", True)
    split = steps[0]
    return (
        len(steps) == 2
        and not steps[1].get("use_regex", True)
        and split.get("type") == "Split"
        and split.get("behavior") == "Isolated"
        and not split.get("invert")
        and (split.get("pattern") or {}).get("Regex") in _SAFE_PATTERNS
    )


def cut(text: str) -> list[str]:
    """Parts of a text that are tokenised alone. All but the first have lost the space that they begin with."""
    return _CUT.split(text) if _UNCUT.search(text) else text.split(" ")


class WordCache:
    """Tokenises texts part by part.

    Parts that are not known yet are tokenised together, with a separator between them: a call of the tokenizer for each
    would cost more than its tokens.

    Args:
        encode: ids of a text, in which the separator is one token and the text around it is cut off.
        separator: not likely in a text. Where it is in one nevertheless, ``encode_alone`` is used.
        separator_id: its id, which no other token has.
        encode_alone: ids of a text in which the separator is a text like any other.
        capacity: parts to remember.
    """

    def __init__(
        self,
        encode: Callable[[str], list[int]],
        separator: str,
        separator_id: int,
        encode_alone: Callable[[str], list[int]],
        capacity: int = CAPACITY,
    ) -> None:
        self._encode, self._encode_alone = encode, encode_alone
        self._separator, self._separator_id = separator, separator_id
        self._capacity = capacity
        self._known: dict[str, bytes] = {}  # ids as int32; keys without the space in front
        self._num_chars = self._pause = 0

    def pays(self) -> bool:
        """Whether the next texts should go this way: not for a while after texts that were mostly new, as program
        code is."""
        if not self._pause:
            return True
        self._pause -= 1
        return False

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of all texts in one array, int32 [num_tokens], and the tokens of each text, int64 [num_texts]."""
        if len(self._known) > self._capacity:
            self._known.clear()
        parts = [cut(text) for text in texts]
        # The first part of a text has no space in front: tokenised, not remembered.
        encoded = [[ids] for ids in self._tokenise([pieces[0] for pieces in parts])]
        unknown: set[str] = set()
        for pieces in parts:
            unknown.update(pieces[1:])
        unknown.difference_update(self._known)
        new = list(unknown)
        num_chars = sum(map(len, texts))
        self._num_chars += num_chars
        if self._num_chars > _WARM_CHARS and sum(map(len, new)) > _MOST_NEW * num_chars:
            self._pause = _PAUSE
        known = self._known
        known.update(zip(new, self._tokenise([f" {part}" for part in new]), strict=True))
        for pieces, ids in zip(parts, encoded, strict=True):
            ids += [known[part] for part in pieces[1:]]
        for part in new:
            if len(part) > _MAX_CHARS:
                del known[part]
        joined = [b"".join(ids) for ids in encoded]
        lengths = np.fromiter(map(len, joined), dtype=np.int64, count=len(joined)) // 4
        return np.frombuffer(b"".join(joined), dtype=np.int32), lengths

    def _tokenise(self, parts: list[str]) -> list[bytes]:
        """Ids of each part."""
        found: list[bytes] = []
        for group in _groups(parts):
            ids = np.array(self._encode(self._separator.join(group)), dtype=np.int32)
            ends = [*np.flatnonzero(ids == self._separator_id).tolist(), len(ids)]
            if len(ends) != len(group):  # somebody wrote the separator
                found += [np.array(self._encode_alone(part), dtype=np.int32).tobytes() for part in group]
                continue
            content, start = ids.tobytes(), 0
            for end in ends:
                found.append(content[4 * start : 4 * end])
                start = end + 1
        return found


def _groups(parts: list[str]) -> Iterator[list[str]]:
    """Parts in lots of about _JOINED_CHARS characters."""
    group: list[str] = []
    size = 0
    for part in parts:
        group.append(part)
        size += len(part)
        if size > _JOINED_CHARS:
            yield group
            group, size = [], 0
    if group:
        yield group
