"""Where this process is in the run: which step, and what it does there. Kept for the report of a job that is stuck.

Noting a position is one assignment, so it may stand in front of every row of a step.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Position:
    """What a process does, and since when."""

    phase: str
    step: int | None = None
    """1-based, as in metrics.jsonl. None: outside of the steps."""
    row: int | None = None
    """0-based row of ``num_rows``, where the phase goes row by row."""
    num_rows: int | None = None
    since: float = 0.0
    """``time.monotonic()`` of this process."""
    count: int = 0
    """Positions noted so far: of two ranks in one step, the one with fewer is behind."""

    def __str__(self) -> str:
        """As in "loading data of step 3" or "embedding forward and backward of step 3, row 2 of 8"."""
        step = "" if self.step is None else f" of step {self.step}"
        row = "" if self.row is None else f", row {self.row + 1} of {self.num_rows}"
        return f"{self.phase}{step}{row}"

    def as_record(self) -> dict[str, Any]:
        """For JSON: ``seconds`` in this position in place of a time that only this process can read."""
        fields = ("phase", "step", "row", "num_rows", "count")
        return {name: getattr(self, name) for name in fields} | {"seconds": time.monotonic() - self.since}

    @staticmethod
    def from_record(record: dict[str, Any]) -> Position:
        """Inverse of :meth:`as_record`, but for the time."""
        return Position(record["phase"], record["step"], record["row"], record["num_rows"])


_position = Position("starting", since=time.monotonic())


def enter(phase: str, step: int | None = None) -> None:
    """Note that this process begins with ``phase``; ``step`` is 1-based."""
    global _position
    _position = Position(phase, step, None, None, time.monotonic(), _position.count + 1)


def at(phase: str, row: int | None = None, num_rows: int | None = None) -> None:
    """:func:`enter` within the present step; ``row`` is 0-based."""
    global _position
    _position = Position(phase, _position.step, row, num_rows, time.monotonic(), _position.count + 1)


def current() -> Position:
    """The position that was noted last."""
    return _position
