"""Which kind of work has the device: passes of several kinds in turn, by the time that each has had."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager


class Turns:
    """The device, which one forward pass has at a time.

    Where several kinds want it, the one that has used it least is next, so each gets an equal share of its time,
    whatever a pass of it takes, and waits for one pass at most. A kind that wanted nothing saves up no time.

    Args:
        kinds: of work. At most one thread of each is :meth:`at_work` at a time.
        clock: seconds.
    """

    def __init__(self, kinds: Sequence[str], clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds = dict.fromkeys(kinds, 0.0)
        """Time that each kind has had the device."""
        self._level = dict.fromkeys(kinds, 0.0)
        self._at_work: set[str] = set()
        self._waiting: set[str] = set()
        self._holder: str | None = None
        self._since = 0.0
        self._clock, self._changed = clock, threading.Condition()

    @contextmanager
    def at_work(self, kind: str) -> Iterator[None]:
        """Work of a kind begins, and ends with the block. It has the device from a :meth:`next_pass` to the next one, a
        :meth:`give_back` or its end."""
        with self._changed:
            others = [self._level[other] for other in self._at_work]
            self._level[kind] = max([self._level[kind], *([min(others)] if others else [])])
            self._at_work.add(kind)
        try:
            yield
        finally:
            with self._changed:
                self.give_back(kind)
                self._at_work.remove(kind)

    def next_pass(self, kind: str) -> None:
        """Wait for the device, which another kind may have before. Called before each forward pass."""
        with self._changed:
            self.give_back(kind)
            self._waiting.add(kind)
            self._changed.wait_for(lambda: self._holder is None and kind == min(self._waiting, key=self._level.get))  # type: ignore[arg-type]
            self._waiting.remove(kind)
            self._holder, self._since = kind, self._clock()

    def give_back(self, kind: str) -> None:
        """Let others have the device, if this kind has it. What it has had less of than they, it gets back as long as
        it stays at work."""
        with self._changed:
            if self._holder == kind:
                used = self._clock() - self._since
                self.seconds[kind] += used
                self._level[kind] += used
                self._holder = None
                self._changed.notify_all()
