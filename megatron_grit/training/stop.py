"""Stopping on a signal or after a time: at the end of the step, on all ranks at once, with a checkpoint."""

from __future__ import annotations

import signal
import time
from types import FrameType, TracebackType
from typing import Any

from megatron_grit.parallel.collectives import largest_of_ranks
from megatron_grit.parallel.context import ParallelContext

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """While entered, the first SIGINT or SIGTERM is noted and a second one acts as it always does.

    Args:
        context: this process's place in the mesh.
        seconds: time from now after which a stop is due. None: no limit.
    """

    def __init__(self, context: ParallelContext, seconds: float | None = None) -> None:
        self.context = context
        self.number: int | None = None
        self._deadline = None if seconds is None else time.monotonic() + seconds
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in _SIGNALS:
            self._handlers[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def on_any_rank(self, number: int = 0) -> tuple[bool, int]:
        """Whether any process of the job was asked to stop, or its time is up. Collective over all ranks.

        Args:
            number: that ranks tell each other on the way.

        Returns:
            Whether to stop, and the largest number of all ranks.
        """
        is_due = self._deadline is not None and time.monotonic() > self._deadline
        stops, largest = largest_of_ranks([self.number is not None or is_due, number], self.context)
        return bool(stops), largest

    @property
    def exit_status(self) -> int:
        """What a shell expects of a process that a signal ended; 0 where time was up and no signal came."""
        if self.number is None and self._deadline is not None and time.monotonic() > self._deadline:
            return 0
        return 128 + (self.number or signal.SIGTERM)
