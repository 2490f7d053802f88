"""Special tokens of a string as the tokenizers library finds them, where their names do not tell.

The library looks for added tokens twice: in the text as it is, the longest at each place, then, between those, in
normalised text for the normalised names of the others. So "<|USER|>" can be "<|user|>", "<s>" under a normaliser that
puts a space in front is found behind spaces alone, and a longer token that is not special can hold the name of one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any

SpecialFinder = Callable[[str], list[tuple[int, int, int]]]
"""Gives the id, the first character and the one after the last of each special token in a string. What a normaliser
puts in front of a text that such a token takes whole stands before it, as tokens of no characters."""


def special_finder(backend: Any, written: Iterable[int]) -> SpecialFinder | None:
    """How special tokens are found. None: as the longest of their names at each place.

    Args:
        backend: a ``tokenizers.Tokenizer`` that reads special tokens as these.
        written: those that templates give by id, whatever stands there.
    """
    added = backend.get_added_tokens_decoder()
    unknown = json.loads(backend.to_str())["model"].get("unk_token")
    looked_for = {index: token for index, token in added.items() if token.special and token.content != unknown}
    read = [token for index, token in looked_for.items() if index not in written]
    normalise = _unchanged if backend.normalizer is None else backend.normalizer.normalize_str
    names = {form for token in read for form in (token.content, normalise(token.content))}
    others = {
        form for token in added.values() if not token.special for form in (token.content, normalise(token.content))
    }
    is_normalised = any(token.normalized for token in read)
    if not is_normalised and not any(_hides(other, name) for other in others for name in names):
        return None

    def find(text: str) -> list[tuple[int, int, int]]:
        encoding = backend.encode(text, add_special_tokens=False)
        found: list[tuple[int, int, int]] = []
        before: list[int] = []  # since the last special token
        done = 0
        for index, (begin, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if index not in looked_for:
                before.append(index)
                continue
            if begin == done:
                found += [(other, begin, begin) for other in before]
            found.append((index, begin, end))
            before, done = [], end
        return found

    return find


def _unchanged(text: str) -> str:
    return text


def _hides(other: str, name: str) -> bool:
    """Whether an added token can take a place where a special one's name begins later."""
    return name in other or any(other.endswith(name[:count]) for count in range(1, len(name)))
