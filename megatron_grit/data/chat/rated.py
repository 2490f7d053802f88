"""Which answers of a preference record are rated: the role that their pieces get."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from megatron_grit.data.chat.chat_format import Piece
from megatron_grit.data.indexed.roles import Role

RATED = {"chosen": Role.CHOSEN, "rejected": Role.REJECTED}


def rate_pieces(sides: Mapping[str, Sequence[Piece]]) -> dict[str, list[Piece]]:
    """The pieces of a record with the roles of rated answers.

    Of a pair these are all answers from the first that differs, of a single conversation its last one. Earlier answers
    are of the prompt.

    Args:
        sides: pieces of the conversation "chosen", "rejected" or of both.
    """
    every = list(sides.values())
    first = _last_answer(every[0]) if len(every) == 1 else _difference(*every)
    return {name: _rate(pieces, first, RATED[name]) for name, pieces in sides.items()}


def _difference(one: Sequence[Piece], other: Sequence[Piece]) -> int:
    """Place of the first piece of the first answer that differs."""
    shorter = min(len(one), len(other))
    place = next((place for place in range(shorter) if one[place] != other[place]), shorter)
    return _start_of_answer(one, place)


def _last_answer(pieces: Sequence[Piece]) -> int:
    """Place of the first piece of the last answer."""
    last = max(place for place, (role, _) in enumerate(pieces) if role is Role.ANSWER)
    return _start_of_answer(pieces, last)


def _start_of_answer(pieces: Sequence[Piece], place: int) -> int:
    while place and pieces[place - 1][0] is Role.ANSWER:
        place -= 1
    return place


def _rate(pieces: Sequence[Piece], first: int, rated: Role) -> list[Piece]:
    return [
        (rated if role is Role.ANSWER and place >= first else role, text) for place, (role, text) in enumerate(pieces)
    ]
