"""What each span of a record is for. A role is stored as the mode byte of a sequence in Megatron's .idx file.

A record is a document of the indexed file; its spans are that document's sequences. The next-token mask and the
pooling mask are read from roles, never from text that is tokenised again.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from enum import IntEnum, StrEnum

from megatron_grit.errors import DataError


class RowKind(StrEnum):
    """Kind of a record: the order that its spans have on disk. A kind of row says which of these records it reads."""

    EMBEDDING = "embedding"
    GENERATIVE = "generative"
    PREFERENCE = "preference"


class Role(IntEnum):
    """Role of a span. The values are on disk: add new ones at the end, never renumber."""

    TEXT = 0
    """Plain text: attended, every token but the first is a label."""
    TEMPLATE = 1
    """Of a conversation: BOS and what the template puts around the turns. Attended, not supervised."""
    ANSWER = 2
    """Of a conversation: an assistant turn and its EOS. Supervised."""
    QUERY_INSTRUCTION = 3
    """Everything before the text of a query, BOS included. Attended, not pooled."""
    QUERY = 4
    """Text of a query. Pooled."""
    POSITIVE_INSTRUCTION = 5
    """Everything before the text of a relevant passage."""
    POSITIVE = 6
    """Text of a relevant passage. Pooled."""
    NEGATIVE_INSTRUCTION = 7
    """Everything before the text of an irrelevant passage."""
    NEGATIVE = 8
    """Text of an irrelevant passage. Pooled."""
    SYSTEM = 9
    """Of a conversation: a system message. Attended, not supervised."""
    USER = 10
    """Of a conversation: a user turn, or a prompt. Attended, not supervised."""
    CHOSEN = 11
    """Of a preference record: a preferred answer, or a desirable one, and its EOS. Supervised."""
    REJECTED = 12
    """Of a preference record: an answer that another is preferred to, or an undesirable one, with its EOS.
    Supervised."""


SUPERVISED = frozenset({Role.TEXT, Role.ANSWER, Role.CHOSEN, Role.REJECTED})
ANSWERS = frozenset({Role.ANSWER, Role.CHOSEN, Role.REJECTED})
"""Of what an assistant says. In preference records ANSWER is an earlier turn that both conversations share: it belongs
to the prompt and is not supervised."""
POOLED = frozenset({Role.QUERY, Role.POSITIVE, Role.NEGATIVE})

_LETTER = dict(zip(Role, "TcAiqjpknsuCR", strict=True))
_GRAMMAR = {
    RowKind.GENERATIVE: re.compile(r"T|([csu]+A)+"),
    RowKind.EMBEDDING: re.compile(r"i?q(j?p)+(k?n)*"),
    RowKind.PREFERENCE: re.compile(r"(?=.)([csuA]+C)*([csuA]+R)*"),
}
_GRAMMAR_TEXT = {
    RowKind.GENERATIVE: "TEXT, or ANSWERs with TEMPLATE, SYSTEM or USER before each",
    RowKind.EMBEDDING: "a QUERY, one or more POSITIVE, any number of NEGATIVE, each with or without its instruction",
    RowKind.PREFERENCE: "a conversation of which CHOSEN is supervised, one of which REJECTED is, or both in this order",
}


def supervised(role: int) -> bool:
    """Whether the tokens of a span are labels of the next-token loss."""
    return role in SUPERVISED


def pooled(role: int) -> bool:
    """Whether the tokens of a span are averaged into an embedding."""
    return role in POOLED


def check_grammar(roles: Sequence[int], kind: RowKind, name: str) -> None:
    """Raise unless the roles of a record's spans come in an order that this kind of record allows.

    Args:
        roles: role of each span.
        kind: kind of the record.
        name: name of the record, for the message.

    Raises:
        DataError: an unknown role, or an order that the grammar does not have.
    """
    try:
        word = "".join(_LETTER[Role(role)] for role in roles)
    except ValueError:
        known = {int(role) for role in Role}
        unknown = next(int(role) for role in roles if role not in known)
        raise DataError(f"record {name} holds role {unknown}, which this version does not know") from None
    if not _GRAMMAR[kind].fullmatch(word):
        found = " ".join(Role(role).name for role in roles) or "nothing"
        raise DataError(f"record {name} is not a record of kind {kind.value}: {_GRAMMAR_TEXT[kind]}; found {found}")


def split_segments(roles: Sequence[int]) -> list[tuple[int, int]]:
    """Spans of each text of an embedding record, as half-open ranges: the query, then every passage.

    A segment is what attends to itself: a text with the instruction before it.
    """
    segments: list[tuple[int, int]] = []
    start = 0
    for index, role in enumerate(roles):
        if role in POOLED:
            segments.append((start, index + 1))
            start = index + 1
    return segments


def split_conversations(roles: Sequence[int]) -> list[tuple[int, int]]:
    """Spans of each conversation of a preference record, as half-open ranges: the chosen one, then the rejected one, or
    the only one. A conversation ends with its last supervised span."""
    ends = [place + 1 for place, role in enumerate(roles) if role == Role.CHOSEN][-1:]
    if roles[-1] == Role.REJECTED:
        ends.append(len(roles))
    return list(zip([0, *ends[:-1]], ends, strict=True))


def split_texts(roles: Sequence[int]) -> list[tuple[int, int]]:
    """Spans of each part of a record that attends to itself and is embedded, as half-open ranges: the texts of an
    embedding record, or the conversations of a preference record. Its last span is what is pooled."""
    return split_segments(roles) or split_conversations(roles)


def num_labels(roles: Sequence[int], lengths: Sequence[int]) -> int:
    """Tokens of a record that are labels: those of TEXT and ANSWER spans, but not the record's first token."""
    labels = sum(int(length) for role, length in zip(roles, lengths, strict=True) if role in SUPERVISED)
    return labels - 1 if roles[0] in SUPERVISED else labels
