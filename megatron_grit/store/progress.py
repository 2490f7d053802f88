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

from megatron_grit.store.logs import LineHandler, get_logger

LineHandler.above_bars = staticmethod(lambda: tqdm.external_write_mode(sys.stderr))  # type: ignore[assignment]
log = get_logger(__name__)

LOG_EVERY = 30.0
"""Seconds between two lines of a log, at least."""
_LONGEST_WAIT = 600.0


def is_terminal(stream: object) -> bool:
    """Whether a stream is a terminal. A closed one and the stand-ins of notebooks are none."""
    try:
        return bool(stream.isatty())  # type: ignore[attr-defined]
    except (AttributeError, OSError, ValueError):
        return False


class Progress:
    """How much of some work is done.

    In a terminal a bar shows it. Elsewhere, as in the log file of a batch job, there is a line every
    :data:`LOG_EVERY` seconds at most, and one at the end of work that took longer; shorter work says nothing.

    Args:
        total: how much there is to do. None: not known.
        description: what is done.
        unit: what ``total`` counts; "B" for bytes.
        enabled: show anything; of several processes one should.
        also: a second thing that is counted, such as "document".
        log_each: a line whenever so many more of ``also`` are done, rather than by the clock.
    """

    def __init__(
        self,
        total: int | None,
        description: str,
        unit: str,
        *,
        enabled: bool = True,
        also: str = "",
        log_each: int | None = None,
    ) -> None:
        terminal = is_terminal(sys.stderr)
        self._bar = tqdm(
            total=total,
            unit=unit,
            unit_scale=True,
            desc=description,
            disable=not (enabled and terminal),
            dynamic_ncols=True,
        )
        self._logs = enabled and not terminal
        self._total, self._description, self._unit = total, description, unit
        self._also, self._log_each, self._num_also, self._also_logged = also, log_each, 0, 0
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

    def update(self, count: int, note: str = "", also: int = 0) -> None:
        """Count what was done since the last call.

        Args:
            count: of it.
            note: what else there is to say now.
            also: of the second thing.
        """
        self._done += count
        self._num_also += also
        self._note = note
        if self._also:
            self._note = f"{self._num_also:,} {plural(self._also)}, {self._rate(self._num_also, self._also)}"
        self._bar.set_postfix_str(self._note, refresh=False)
        self._bar.update(count)
        if self._log_each is not None:
            is_due = self._num_also - self._also_logged >= self._log_each
        else:
            is_due = time.monotonic() - self._logged >= LOG_EVERY
        if self._logs and is_due:
            self._log()

    def _log(self) -> None:
        self._logged, self._also_logged = time.monotonic(), self._num_also
        done = self._earlier + self._done
        amount = self._amount(done)
        if self._total is not None:
            share = 100 * done / self._total if self._total else 100
            amount = f"{self._amount(done, named=False)} of {self._amount(self._total)} ({share:.0f}%)"
        left = ""
        if self._total is not None:
            seconds = max(self._total - done, 0) * self._seconds() / self._done if self._done else 0
            left = f", {_duration(seconds)} left"
        log.info(f"{self._description}: {amount}, {self._rate(self._done, self._unit)}{left}{self._notes()}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(failed=kind is not None)

    def close(self, *, failed: bool = False) -> None:
        """End the bar, or log a last line of long work that has not failed."""
        self._bar.close()
        if self._logs and not failed and (self._logged != self._began or self._seconds() >= LOG_EVERY):
            amount, rate = self._amount(self._done), self._rate(self._done, self._unit)
            log.info(f"{self._description}: {amount} in {_duration(self._seconds())}, {rate}{self._notes()}")

    def _seconds(self) -> float:
        return max(time.monotonic() - self._began, 1e-9)

    def _amount(self, count: int, *, named: bool = True) -> str:
        if self._unit == "B":
            return f"{tqdm.format_sizeof(count)}B"
        return f"{count:,} {plural(self._unit)}" if named else f"{count:,}"

    def _rate(self, count: int, unit: str) -> str:
        rate = count / self._seconds()
        if unit == "B":
            return f"{tqdm.format_sizeof(rate)}B/s"
        return f"{rate:,.0f} {plural(unit)}/s" if rate >= 10 else f"{rate:.2g} {plural(unit)}/s"

    def _notes(self) -> str:
        return f"; {self._note}" if self._note else ""


def plural(unit: str) -> str:
    """Several of a unit."""
    return f"{unit[:-1]}ies" if unit.endswith("y") else f"{unit}s"


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
