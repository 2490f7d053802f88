"""Special tokens as the tokenizers library finds them: the longest at each place, alone or within a word, and the white
space beside them that ``lstrip`` and ``rstrip`` make theirs."""

from __future__ import annotations

import itertools
import re
import sys
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence

from megatron_grit.data.chat.chat_format import Piece
from megatron_grit.data.indexed.roles import Role
from megatron_grit.data.text.special_finder import SpecialFinder
from megatron_grit.data.text.tokenizer import Tokenizer

_WHITE = "".join(filter(str.isspace, map(chr, range(sys.maxunicode + 1)))).translate(dict.fromkeys(range(0x1C, 0x20)))
"""Unicode's White_Space, which the library strips; ``str.strip`` takes four control characters more."""
_WORD = re.compile(r"\w")


class SpecialTokens:
    """Splits what a template wrote at the tokenizer's special tokens.

    Args:
        tokenizer: the tokenizer.
        others: more names that are ids, by name.
    """

    def __init__(self, tokenizer: Tokenizer, others: Mapping[str, int] | None = None) -> None:
        self.ids = {name: index for name, index in {**tokenizer.special_tokens, **(others or {})}.items() if name}
        self._single_words = tokenizer.single_word
        longest_first = sorted(self.ids, key=len, reverse=True)
        self._names = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def split(self, text: str, start: int = 0, stop: int | None = None) -> list[str | int]:
        """Special tokens' ids, and the text between them, of ``text[start:stop]``. What stands around that range is
        looked at where a token has to be a word of its own."""
        stop = len(text) if stop is None else stop
        parts: list[str | int] = []
        for match in self._names.finditer(text, start, stop):
            begin, end = match.span()
            beside = text[begin - 1 : begin] + text[end : end + 1] if begin else text[end : end + 1]
            if self.ids[match.group()] in self._single_words and _WORD.search(beside):
                continue
            parts += [text[start:begin], self.ids[match.group()]]
            start = end
        return [part for part in (*parts, text[start:stop]) if part != ""]


def as_found(tokenizer: Tokenizer, pieces: Sequence[Piece]) -> Sequence[Piece]:
    """Pieces as the library finds them in the whole string: special tokens that have to be words of their own are text
    beside a word, and others take the white space beside them, whoever wrote it. BOS and EOS of a template are never
    text, and what a message says is no special token."""
    if tokenizer.find_special is None:
        return _without_stripped(tokenizer, _only_words(tokenizer, pieces))
    return _as_library(tokenizer, tokenizer.find_special, pieces)


def _as_library(tokenizer: Tokenizer, find: SpecialFinder, pieces: Sequence[Piece]) -> list[Piece]:
    """Pieces with the special tokens that the library finds in the string that they make."""
    names = {index: name for name, index in tokenizer.special_tokens.items()}
    texts = [value if isinstance(value, str) else names.get(value, " ") for _, value in pieces]
    ends = list(itertools.accumulate(map(len, texts)))
    kept: list[Piece] = []

    always = (tokenizer.bos_id, tokenizer.eos_id)

    def add_text(start: int, stop: int) -> None:
        for (role, value), text, end in zip(pieces, texts, ends, strict=True):
            if part := text[max(0, start - end + len(text)) : max(0, stop - end + len(text))]:
                kept.append((role, value if value in always else part))

    whole, done = "".join(texts), 0
    for index, start, stop in find(whole):
        if start == stop:
            kept.append((pieces[bisect_right(ends, start)][0], index))
            continue
        # The white space beside its name, which the token takes, may be anybody's.
        first, last = _name_in(whole, start, stop, names[index])
        owners = range(bisect_right(ends, first), bisect_left(ends, last) + 1)
        mine = [place for place in owners if not isinstance(pieces[place][1], str)]
        same = [place for place in mine if pieces[place][1] == index]
        if not same and any(place not in mine and pieces[place][0] is not Role.TEMPLATE for place in owners):
            if not mine:
                continue  # a message says its name
            same = mine[:1]  # a longer name that goes on into a message
            start, stop = ends[mine[0]] - len(texts[mine[0]]), ends[mine[0]]
        add_text(done, start)
        kept.append(pieces[same[0]] if same else (pieces[owners[0]][0], index))
        done = stop
    add_text(done, ends[-1] if ends else 0)
    return kept


def _name_in(text: str, start: int, stop: int, name: str) -> tuple[int, int]:
    """Where the name of a special token stands within what the token takes."""
    place = text.find(name, start, stop)
    if place >= 0:
        return place, place + len(name)
    taken = text[start:stop]  # it is written otherwise than in normalised text
    return start + len(taken) - len(taken.lstrip(_WHITE)), stop - len(taken) + len(taken.rstrip(_WHITE))


def _only_words(tokenizer: Tokenizer, pieces: Sequence[Piece]) -> Sequence[Piece]:
    words = tokenizer.single_word - {tokenizer.bos_id, tokenizer.eos_id}
    if not any(value in words for _, value in pieces):
        return pieces
    names = {index: name for name, index in tokenizer.special_tokens.items()}
    written = [value if isinstance(value, str) else names.get(value, " ") for _, value in pieces]
    kept: list[Piece] = []
    for place, (role, value) in enumerate(pieces):
        beside = written[place - 1][-1:] if place else ""
        beside += written[place + 1][:1] if place + 1 < len(written) else ""
        kept.append((role, written[place] if value in words and _WORD.search(beside) else value))
    return kept


def _without_stripped(tokenizer: Tokenizer, pieces: Sequence[Piece]) -> Sequence[Piece]:
    if not tokenizer.lstrip and not tokenizer.rstrip:
        return pieces
    kept: list[Piece] = []
    taken = False  # white space that comes now is the special token's before it
    for role, value in pieces:
        if isinstance(value, str):
            value = value.lstrip(_WHITE) if taken else value
            if value:
                kept.append((role, value))
                taken = False
            continue
        while value in tokenizer.lstrip and kept and isinstance(text := kept[-1][1], str):
            before, _ = kept.pop()
            if text := text.rstrip(_WHITE):
                kept.append((before, text))
                break
        kept.append((role, value))
        taken = value in tokenizer.rstrip
    return kept
