"""Pieces of text with roles to tokens with roles, for many records at once.

The text between two special tokens is tokenised in one go, so that ids are those of the whole rendering, and a role is
given to each token by the characters it stands for: a token belongs to the piece that its first character lies in. No
text is tokenised a second time to find out how many tokens it has.

Answers are checked: what is supervised is every character of an answer and nothing before or after it. One thing gives:
a token that begins with spaces of the prompt and goes on into the answer, as ``▁Yes`` after ``[/INST]`` does, belongs
to the answer, for the model has to generate it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from megatron_grit.data.chat.chat_format import Piece
from megatron_grit.data.indexed.roles import ANSWERS, Role
from megatron_grit.data.text.special import as_found
from megatron_grit.data.text.token_offsets import EncodedTexts
from megatron_grit.data.text.tokenizer import Tokenizer

Span = tuple[Role, list[int]]
_ANSWERS = sorted(ANSWERS)


@dataclass(frozen=True)
class SpanTable:
    """Spans of several units (a conversation, a plain text, or one text of an embedding record), as arrays."""

    tokens: np.ndarray
    """int32 [num_tokens]."""
    lengths: np.ndarray
    """int64 [num_spans]: tokens of each span, at least 1."""
    roles: np.ndarray
    """int8 [num_spans]."""
    counts: np.ndarray
    """int64 [num_units]: spans of each unit."""
    problems: dict[int, str] = field(default_factory=dict)
    """Units whose answers the tokenizer does not keep apart, and why."""

    def unit_of_span(self) -> np.ndarray:
        """Unit of each span: int64 [num_spans]."""
        return np.repeat(np.arange(len(self.counts)), self.counts)

    def unit_tokens(self) -> np.ndarray:
        """Tokens of each unit: int64 [num_units]."""
        return np.bincount(self.unit_of_span(), weights=self.lengths, minlength=len(self.counts)).astype(np.int64)

    def spans(self, unit: int) -> list[Span]:
        """One unit in plain form."""
        ends = np.concatenate(([0], np.cumsum(self.lengths))).tolist()
        first = int(self.counts[:unit].sum())
        spans = range(first, first + int(self.counts[unit]))
        return [(Role(int(self.roles[i])), self.tokens[ends[i] : ends[i + 1]].tolist()) for i in spans]

    def cut(self, limits: np.ndarray) -> SpanTable:
        """The first tokens of each unit.

        A unit with answers loses what stands after its last answer: in causal attention nothing depends on it.

        Args:
            limits: int64 [num_units], tokens to keep.
        """
        if not len(self.lengths):
            return self
        units = self.unit_of_span()
        before = np.cumsum(self.lengths) - self.lengths
        first = np.concatenate(([0], np.cumsum(self.counts)))[:-1]
        before = before - before[np.minimum(first, len(before) - 1)][units]
        lengths = np.clip(limits[units] - before, 0, self.lengths)
        answered = np.zeros(len(self.counts), dtype=bool)
        is_answer = np.isin(self.roles, _ANSWERS)
        answered[units[is_answer]] = True
        last = np.full(len(self.counts), -1)
        np.maximum.at(last, units, np.where(is_answer & (lengths > 0), np.arange(len(units)), -1))
        lengths[answered[units] & (np.arange(len(units)) > last[units])] = 0
        return self._shorten(lengths)

    def terminated(self, whole: SpanTable) -> SpanTable:
        """With the last token of each answer that was cut replaced by its end token; one of which nothing else would be
        left goes, and with it what stands after the answer before it. A unit may lose all.

        Args:
            whole: the table that this one was cut from.
        """
        ends, own_ends = np.cumsum(whole.counts), np.cumsum(self.counts)
        kept = np.flatnonzero(self.counts > 0)
        last = own_ends[kept] - 1  # spans that a cut can have reached: the last of each unit
        source = ends[kept] - whole.counts[kept] + self.counts[kept] - 1
        cut = np.isin(self.roles[last], _ANSWERS) & (self.lengths[last] < whole.lengths[source])
        kept, last, source = kept[cut], last[cut], source[cut]
        if not len(kept):
            return self
        tokens = self.tokens.copy()
        tokens[np.cumsum(self.lengths)[last] - 1] = whole.tokens[np.cumsum(whole.lengths)[source] - 1]
        bare = self.lengths[last] == 1
        limits = np.bincount(self.unit_of_span(), weights=self.lengths, minlength=len(self.counts)).astype(np.int64)
        limits[kept[bare]] -= 1
        return replace(self, tokens=tokens).cut(limits)

    def select(self, kept: np.ndarray) -> SpanTable:
        """Without the spans of units for which ``kept``, bool [num_units], is false. The units stay, empty."""
        return self if kept.all() else self._shorten(np.where(kept[self.unit_of_span()], self.lengths, 0))

    def _shorten(self, lengths: np.ndarray) -> SpanTable:
        """Spans cut to ``lengths``; those of length 0 go."""
        if np.array_equal(lengths, self.lengths):
            return self
        starts = np.cumsum(self.lengths) - self.lengths
        place = np.arange(len(self.tokens)) - np.repeat(starts, self.lengths)
        stays = lengths > 0
        return replace(
            self,
            tokens=self.tokens[place < np.repeat(lengths, self.lengths)],
            lengths=lengths[stays],
            roles=self.roles[stays],
            counts=np.bincount(self.unit_of_span()[stays], minlength=len(self.counts)),
        )


def encode_units(tokenizer: Tokenizer, units: Sequence[Sequence[Piece]]) -> SpanTable:
    """Tokens and roles of units, each a sequence of pieces. Neighbouring pieces of one role make one span."""
    layout = _Layout([as_found(tokenizer, unit) for unit in units])
    encoded = _encode_stretches(tokenizer, layout)
    cuts = layout.cuts(encoded)
    problems = _check_answers(tokenizer, layout, encoded, cuts)
    num_tokens = np.ones(len(layout.roles), dtype=np.int64)  # of each piece; special tokens have one
    num_tokens[layout.text_pieces] = np.diff(cuts, append=len(encoded.ids))
    tokens = np.empty(int(num_tokens.sum()), dtype=np.int32)
    from_text = np.ones(len(tokens), dtype=bool)
    special = layout.special >= 0
    places = (np.cumsum(num_tokens) - num_tokens)[special]
    from_text[places] = False
    tokens[places] = layout.special[special]
    tokens[from_text] = encoded.ids
    filled = num_tokens > 0
    roles, piece_units = layout.roles[filled], layout.units[filled]
    if not len(roles):
        nothing = np.empty(0, dtype=np.int64)
        return SpanTable(tokens, nothing, roles, np.zeros(len(units), dtype=np.int64), problems)
    begins = np.flatnonzero(np.diff(roles, prepend=-1) | np.diff(piece_units, prepend=-1))
    lengths = np.add.reduceat(num_tokens[filled], begins)
    counts = np.bincount(piece_units[begins], minlength=len(units))
    return SpanTable(tokens, lengths, roles[begins], counts, problems)


def _encode_stretches(tokenizer: Tokenizer, layout: _Layout) -> EncodedTexts:
    readers = (tokenizer, tokenizer.after_special, tokenizer.after_normalized if tokenizer.normalized else tokenizer)
    if all(reader is tokenizer for reader in readers):
        return tokenizer.encode_batch_with_offsets(layout.texts)
    which = (layout.before >= 0).astype(np.int64) + np.isin(layout.before, list(tokenizer.normalized))
    groups = [np.flatnonzero(which == number) for number in range(len(readers))]
    parts = [
        reader.encode_batch_with_offsets([layout.texts[index] for index in group.tolist()])
        for reader, group in zip(readers, groups, strict=True)
    ]
    by_text = np.argsort(np.concatenate(groups))
    owners = [np.repeat(group, part.lengths) for group, part in zip(groups, parts, strict=True)]
    by_token = np.argsort(np.concatenate(owners), kind="stable")
    return EncodedTexts(
        ids=np.concatenate([part.ids for part in parts])[by_token],
        lengths=np.concatenate([part.lengths for part in parts])[by_text],
        begins=np.concatenate([part.begins for part in parts])[by_token],
        ends=np.concatenate([part.ends for part in parts])[by_token],
        covered=np.concatenate([part.covered for part in parts])[by_text],
    )


class _Layout:
    """Where each piece lies in the stretches of text between special tokens."""

    def __init__(self, units: Sequence[Sequence[Piece]]) -> None:
        pieces = [piece for unit in units for piece in unit]
        values = [value for _, value in pieces]
        counts = np.fromiter(map(len, units), dtype=np.int64, count=len(units))
        self.roles = np.frombuffer(bytes([role for role, _ in pieces]), dtype=np.int8)
        self.special = np.array([-1 if isinstance(value, str) else value for value in values], dtype=np.int64)
        """Id of each piece, -1 for text."""
        self.units = np.repeat(np.arange(len(units)), counts)
        self.text_pieces = np.flatnonzero(self.special < 0)
        # A piece of text goes on with the stretch of the piece before it, if that is text of the same unit.
        joined = np.diff(self.text_pieces, prepend=-2) == 1
        joined[1:] &= np.diff(self.units[self.text_pieces]) == 0
        self.stretches = np.cumsum(~joined) - 1
        """Stretch of each piece of text."""
        heads = self.text_pieces[~joined]
        follows = (heads > 0) & (self.units[heads] == self.units[np.maximum(heads - 1, 0)])
        self.before = np.where(follows, self.special[np.maximum(heads - 1, 0)], -1)
        """Special token before each stretch; -1: none."""
        last = np.flatnonzero(np.append(~joined[1:], True))  # last piece of text of each stretch
        tails = self.text_pieces[last] + 1 if len(heads) else heads
        self.texts: list[str] = ["".join(values[a:b]) for a, b in zip(heads.tolist(), tails.tolist(), strict=True)]  # type: ignore[arg-type]
        sizes = np.array([len(values[place]) for place in self.text_pieces.tolist()], dtype=np.int64)  # type: ignore[arg-type]
        before = np.cumsum(sizes) - sizes
        self.offsets = before - before[~joined][self.stretches] if len(sizes) else sizes
        """First character of each piece of text within its stretch."""

    def cuts(self, encoded: EncodedTexts) -> np.ndarray:
        """First token of each piece of text."""
        sizes = np.fromiter(map(len, self.texts), dtype=np.int64, count=len(self.texts))
        bases = np.cumsum(sizes + 1) - sizes - 1
        begins = np.maximum.accumulate(encoded.begins + np.repeat(bases, encoded.lengths))
        cuts = np.searchsorted(begins, bases[self.stretches] + self.offsets)
        first = self.offsets == 0  # also takes tokens that stand for no character
        first_tokens = np.cumsum(encoded.lengths) - encoded.lengths
        cuts[first] = first_tokens[self.stretches[first]]
        return cuts


def _check_answers(tokenizer: Tokenizer, layout: _Layout, encoded: EncodedTexts, cuts: np.ndarray) -> dict[int, str]:
    """Problems by unit. Moves a cut before a token that begins with spaces of the prompt and belongs to the answer."""
    answers = np.isin(layout.roles[layout.text_pieces], _ANSWERS)
    units = layout.units[layout.text_pieces]
    problems: dict[int, str] = {}
    for stretch in np.flatnonzero(~encoded.covered).tolist():
        for piece in np.flatnonzero(answers & (layout.stretches == stretch)).tolist():
            if (lost := _lost_character(layout, encoded, stretch, piece)) is not None:
                problems[int(units[piece])] = f"the tokenizer has no token for {lost!r} of an answer"
    if len(cuts) < 2 or not len(encoded.ids):
        return problems
    inner = layout.stretches[1:] == layout.stretches[:-1]
    changes = inner & (answers[1:] != answers[:-1]) & (cuts[1:] > 0)
    crossed = encoded.ends[np.maximum(cuts[1:] - 1, 0)] > layout.offsets[1:]
    # The token before the cut is of the same stretch: a stretch's first token begins at its first character.
    for piece in (np.flatnonzero(changes & crossed) + 1).tolist():
        text, boundary, token = layout.texts[layout.stretches[piece]], int(layout.offsets[piece]), int(cuts[piece]) - 1
        if answers[piece] and not text[int(encoded.begins[token]) : boundary].strip(" "):
            cuts[piece] = token
            continue
        spelling = tokenizer.id_to_token(int(encoded.ids[token]))
        if answers[piece]:
            what = f"the template's end with the start of the answer {text[boundary : boundary + 20]!r}"
            follows = "part of the answer would not be trained"
        else:
            what = f"the answer's end with {text[boundary : boundary + 20]!r}, which follows it,"
            follows = "part of the template would be trained"
        problems[int(units[piece])] = (
            f"the tokenizer merges {what} into {spelling!r}, so that {follows}; "
            "use a tokenizer that keeps newlines apart from text, or another template"
        )
    return problems


def _lost_character(layout: _Layout, encoded: EncodedTexts, stretch: int, piece: int) -> str | None:
    """A character of an answer, other than white space, that no token stands for."""
    text, start = layout.texts[stretch], int(layout.offsets[piece])
    same = piece + 1 < len(layout.stretches) and layout.stretches[piece + 1] == stretch
    stop = int(layout.offsets[piece + 1]) if same else len(text)
    first = int(encoded.lengths[:stretch].sum())
    tokens = slice(first, first + int(encoded.lengths[stretch]))
    change = np.zeros(len(text) + 1, dtype=np.int64)
    begins, ends = encoded.begins[tokens], encoded.ends[tokens]
    real = ends > begins
    np.add.at(change, begins[real], 1)
    np.add.at(change, ends[real], -1)
    bare = np.flatnonzero(np.cumsum(change)[start:stop] == 0) + start
    return next((text[place] for place in bare.tolist() if not text[place].isspace()), None)
