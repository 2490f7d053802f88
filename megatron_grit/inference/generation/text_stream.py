"""Text of an answer while its tokens come."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_grit.data.text.tokenizer import Tokenizer

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
"""What bytes that are no whole character yet are decoded to."""


class TextStream:
    """Turns tokens into pieces of text, one after another the decoded answer up to a stop text.

    A piece holds whole characters only, and nothing that may turn out to be the beginning of a stop text.

    Args:
        tokenizer: of the tokens.
        stops: texts before the first of which the answer ends.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        self._tokenizer, self._stops = tokenizer, stops
        self._tokens: list[int] = []
        self._decoded, self._context = 0, 0
        self._text, self._sent = "", 0
        self.ended = False
        """Whether a stop text was found; no further token counts."""

    def push(self, token: int) -> str:
        """Add a token of the answer.

        Returns:
            The text that is certain by now and was not returned before, which may be empty.
        """
        self._tokens.append(token)
        # What a token is spelled as may depend on the one before, hence the context. Decoding all tokens each time
        # would take the square of their number.
        known = self._tokenizer.decode(self._tokens[self._context : self._decoded])
        text = self._tokenizer.decode(self._tokens[self._context :])
        if len(text) <= len(known) or text.endswith(_INCOMPLETE):
            return ""
        self._context, self._decoded = self._decoded, len(self._tokens)
        return self._take(text[len(known) :])

    def _take(self, new: str) -> str:
        before, self._text = len(self._text), self._text + new
        first = max(0, before - max(map(len, self._stops), default=0))
        end = stop_at(self._text, self._stops, first)
        if end >= 0:
            self.ended, self._text = True, self._text[:end]
            return self._send(end)
        return self._send(len(self._text) - _held_back(self._text, self._stops))

    def _send(self, end: int) -> str:
        piece, self._sent = self._text[self._sent : end], max(self._sent, end)
        return piece

    def close(self) -> tuple[str, str]:
        """The whole answer, and of it what was not returned before."""
        text = self._tokenizer.decode(self._tokens)
        end = stop_at(text, self._stops)
        text = text if end < 0 else text[:end]
        return text, text[self._sent :]


def stop_at(text: str, stops: Sequence[str], first: int = 0) -> int:
    """Where the first of the stop texts begins, from ``first`` on; -1: there is none."""
    return min((place for stop in stops if (place := text.find(stop, first)) >= 0), default=-1)


def _held_back(text: str, stops: Sequence[str]) -> int:
    """Characters at the end that a stop text may begin with."""
    longest = max(map(len, stops), default=0)
    sizes = range(min(longest - 1, len(text)), 0, -1)
    return next((size for size in sizes if any(stop.startswith(text[-size:]) for stop in stops)), 0)
