"""How much of a neighbor a model has just read or is about to predict: runs of tokens that two texts share."""

from __future__ import annotations

import numpy as np

RUN = 8
"""Tokens of a run."""
_BYTES = 4


class Runs:
    """The different runs of eight tokens of a text; a shorter text is one run.

    Args:
        tokens: int [n].
    """

    __slots__ = ("content", "length", "runs")

    def __init__(self, tokens: np.ndarray) -> None:
        self.length = len(tokens)
        self.content = np.ascontiguousarray(tokens, dtype=np.int32).tobytes()
        self.runs = self.of_length(min(RUN, self.length))

    def of_length(self, length: int) -> frozenset[bytes]:
        """The different runs of so many tokens."""
        size = _BYTES * length
        last = len(self.content) - size if length else -1
        return frozenset(self.content[place : place + size] for place in range(0, last + 1, _BYTES))


def shared_runs(text: Runs, other: Runs) -> float:
    """Share of the different runs of ``text`` that stand in ``other``, from 0 to 1; 0 for a text without tokens."""
    if not text.runs:
        return 0.0
    theirs = other.runs if text.length >= RUN else other.of_length(text.length)
    return len(text.runs & theirs) / len(text.runs)
