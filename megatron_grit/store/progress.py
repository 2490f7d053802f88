"""How far long work is: a bar in a terminal, now and then a line in a log."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import TracebackType
from typing import Self

from tqdm import tqdm

from megatron_grit.store.logs import get_logger

log = get_logger(__name__)

LOG_EVERY = 30.0
"""Seconds between two lines of a log, at least."""
_LONGEST_WAIT = 600.0


class Progress:
    """Work of a known length.

    In a terminal a bar shows it. Elsewhere, as in the log file of a batch job, there is a line every
    :data:`LOG_EVERY` seconds at most, and one at the end of work that took longer; shorter work says nothing.

    Args:
        total: how much there is to do.
        description: what is done.
        unit: what ``total`` counts; "B" for bytes.
        enabled: show anything; of several processes one should.
        log_every: seconds between lines. None: only where :meth:`log` is called.
    """

    def __init__(
        self, total: int, description: str, unit: str, *, enabled: bool = True, log_every: float | None = LOG_EVERY
    ) -> None:
        terminal = sys.stderr.isatty()
        self._bar = tqdm(total=total, unit=unit, unit_scale=True, desc=description, disable=not (enabled and terminal))
        self._logs = enabled and not terminal
        self._total, self._description, self._unit = total, description, unit
        self._log_every, self._has_logged = log_every, False
        self._earlier = self._done = 0
        self._note = ""
        self._began = self._logged = time.monotonic()

    def skip(self, count: int) -> None:
        """Count what an earlier run has done; it does not count for the rate."""
        self._earlier += count
        if not self._bar.disable:
            self._bar.initial += count
            self._bar.last_print_n += count
            self._bar.n += count

    def update(self, count: int, note: str = "") -> None:
        """Count what was done since the last call.

        Args:
            count: of it.
            note: what else there is to say now.
        """
        self._done += count
        self._note = note
        self._bar.set_postfix_str(note, refresh=False)
        self._bar.update(count)
        if self._log_every is not None and time.monotonic() - self._logged >= self._log_every:
            self.log()

    def log(self) -> None:
        """Log a line, where there is no terminal."""
        if not self._logs:
            return
        self._logged, self._has_logged = time.monotonic(), True
        done, seconds = self._earlier + self._done, self._seconds()
        share = 100 * done / self._total if self._total else 100
        left = max(self._total - done, 0) * seconds / self._done if self._done else 0
        amount = f"{self._amount(done, named=False)} of {self._amount(self._total)} ({share:.0f}%)"
        log.info(f"{self._description}: {amount}, {self._rate()}, {_duration(left)} left{self._notes()}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
        is_long = self._log_every is not None and self._seconds() >= self._log_every
        if self._logs and kind is None and (self._has_logged or is_long):
            amount = self._amount(self._done)
            log.info(f"{self._description}: {amount} in {_duration(self._seconds())}, {self._rate()}{self._notes()}")

    def _seconds(self) -> float:
        return max(time.monotonic() - self._began, 1e-9)

    def _amount(self, count: int, *, named: bool = True) -> str:
        if self._unit == "B":
            return f"{tqdm.format_sizeof(count)}B"
        return f"{count:,} {self._unit}s" if named else f"{count:,}"

    def _rate(self) -> str:
        rate = self._done / self._seconds()
        if self._unit == "B":
            return f"{tqdm.format_sizeof(rate)}B/s"
        return f"{rate:,.0f} {self._unit}s/s" if rate >= 10 else f"{rate:.2g} {self._unit}s/s"

    def _notes(self) -> str:
        return f"; {self._note}" if self._note else ""


@contextmanager
def still_at_work(description: str, *, first: float = LOG_EVERY) -> Iterator[None]:
    """Log now and then that work whose length is not known goes on: after ``first`` seconds, then each time after twice
    as long, at last every ten minutes.

    Args:
        description: what is done.
        first: seconds until the first line.
    """
    ended, began = threading.Event(), time.monotonic()

    def tick() -> None:
        wait = first
        while not ended.wait(wait):
            elapsed = time.monotonic() - began
            log.info(f"{description}: {_duration(elapsed)} so far")
            wait = min(elapsed, _LONGEST_WAIT)

    thread = threading.Thread(target=tick, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
