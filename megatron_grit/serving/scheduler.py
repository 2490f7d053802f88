"""When requests are computed: those of a kind in their order, kinds side by side, none for longer than it may."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from typing import Any, Literal

from megatron_grit.config.options import ServingLimits
from megatron_grit.serving.fields import Json, RequestError
from megatron_grit.serving.turns import Turns

Kind = Literal["embed", "generate"]
KINDS: tuple[Kind, ...] = ("embed", "generate")
"""Work that takes turns: vectors and scores of texts that are given, and texts that are made."""

Work = Callable[[Callable[[], None]], Generator[Json, None, Json | None]]
"""A request's computation: it takes what is called before each forward pass, yields what is to be sent, and returns the
``usage`` of a stream."""


class Abandoned(Exception):
    """Nobody waits for the answer."""


class Run:
    """A request's work, which waits for its turn or is computed in a thread.

    Args:
        work: what to do.
        seconds: time for all of it, waiting included.
    """

    def __init__(self, work: Work, seconds: float) -> None:
        self.work, self._seconds = work, seconds
        self._deadline = time.monotonic() + seconds
        self._items: asyncio.Queue[tuple[str, Any]] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._abandoned = threading.Event()

    async def next(self, gone: asyncio.Future[None]) -> tuple[bool, Any]:
        """The next thing to send and that it is one, or what the work returned at its end.

        Args:
            gone: done when the client has left.

        Raises:
            Abandoned: it has.
            RequestError: the time is over, with status 504.
        """
        item: asyncio.Future[Any] = asyncio.ensure_future(self._items.get())
        try:
            left = max(0.0, self._deadline - time.monotonic())
            await asyncio.wait([item, gone], timeout=left, return_when=asyncio.FIRST_COMPLETED)
            if not item.done():
                if gone.done():
                    raise Abandoned
                message = f"there was no answer within {self._seconds:g} s; ask for less, or try again later"
                raise RequestError(message, None, status=504, code="timeout")
            what, value = item.result()
        finally:
            item.cancel()
        if what == "error":
            raise value
        return what == "item", value

    def abandon(self) -> None:
        """End the work before its next forward pass."""
        self._abandoned.set()

    def check(self) -> None:
        """Raise :class:`Abandoned` if nobody waits for the answer."""
        if self._abandoned.is_set():
            raise Abandoned

    def tell(self, what: str, value: Any) -> None:
        """Hand something over, from any thread."""
        with suppress(RuntimeError):  # the server has ended, and its loop is closed
            self._loop.call_soon_threadsafe(self._items.put_nowait, (what, value))


class Scheduler:
    """Computes requests: of each kind one at a time, first come, first served; kinds take turns (:class:`Turns`).

    Args:
        limits: how many may wait, and how long.
    """

    def __init__(self, limits: ServingLimits) -> None:
        self._limits = limits
        self.turns = Turns(KINDS)
        self.stopping = False
        """Whether new requests are refused."""
        self._workers = {kind: ThreadPoolExecutor(1, kind) for kind in KINDS}
        self._changing = threading.Lock()
        self._waiting: dict[Kind, deque[Run]] = {kind: deque() for kind in KINDS}
        self._running: dict[Kind, Run | None] = dict.fromkeys(KINDS)

    @property
    def busy(self) -> bool:
        """Whether any request waits or is computed."""
        return any(sum(self.count(kind)) for kind in KINDS)

    def count(self, kind: Kind) -> tuple[int, int]:
        """How many requests of a kind wait for their turn, and how many are computed: at most one."""
        return len(self._waiting[kind]), int(self._running[kind] is not None)

    def start(self, kind: Kind, work: Work) -> Run:
        """Queue a request's work.

        Raises:
            RequestError: too many wait, with status 429, or the server is being stopped, with status 503.
        """
        if self.stopping:
            raise RequestError("the server is being stopped", None, status=503, code="stopping")
        run = Run(work, self._limits.max_seconds)
        with self._changing:
            if self._running[kind] is None:
                self._running[kind] = run
                self._workers[kind].submit(self._compute, kind, run)
            elif (num_waiting := len(self._waiting[kind])) < self._limits.max_waiting:
                self._waiting[kind].append(run)
            else:
                message = f"{num_waiting} requests wait already; try again later"
                raise RequestError(message, None, status=429, code="rate_limit_exceeded")
        return run

    def abandon(self, kind: Kind, run: Run) -> None:
        """Nobody waits for a request any more: it leaves the queue, or ends before its next forward pass."""
        run.abandon()
        with self._changing, suppress(ValueError):
            self._waiting[kind].remove(run)

    def _compute(self, kind: Kind, run: Run | None) -> None:
        """A request, and then those that wait: the next one begins at once, whatever the event loop does."""
        with self.turns.at_work(kind):
            while run is not None:
                self._work(kind, run)
                self.turns.give_back(kind)
                with self._changing:
                    run = self._running[kind] = self._waiting[kind].popleft() if self._waiting[kind] else None

    def _work(self, kind: Kind, run: Run) -> None:
        def before_pass() -> None:
            run.check()
            self.turns.next_pass(kind)

        try:
            # Closed whatever happens: an answer that nobody waits for gives its cache back.
            with closing(run.work(before_pass)) as pieces:
                while True:
                    run.check()
                    try:
                        run.tell("item", next(pieces))
                    except StopIteration as end:
                        run.tell("end", end.value)
                        return
        except Abandoned:
            pass
        except Exception as error:
            run.tell("error", error)
