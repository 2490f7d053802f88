"""Watches over a job of several processes: who ended first, who is stuck, and where everybody stands.

A thread of each rank publishes that rank's position in the job's key-value store, which under torchrun outlives every
rank. So a rank that is frozen, killed or inside native code is known by the position that it published last. Nothing
here is a collective, and nothing runs in the training thread but an assignment (:mod:`positions`).

- A rank that fails says so in the store before it ends. The connections that break because of it are then told from
  failures of their own: :class:`JobError` in place of a page of gloo's or NCCL's errors.
- A rank that vanishes is found by its neighbour on the same host, by its process id.
- Before ``parallel.timeout_minutes`` have passed in one place, all positions and stacks are printed, once.
- A rank whose training thread does not notice that the job is over, as one that waits for a GPU, is ended.
- A launcher ends the ranks that are left as soon as one is gone: such a rank says whose end that was before its own.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
from types import FrameType, TracebackType
from typing import Any

import torch.distributed as dist

from megatron_grit.errors import GritError, JobError
from megatron_grit.parallel import positions
from megatron_grit.parallel.context import ParallelContext
from megatron_grit.parallel.stuck_report import Answer, stacks_of_this_process, stuck_report
from megatron_grit.store.environment import is_alive, process_space

_SECONDS_FOR_CAUSE = 5.0
_SECONDS_FOR_TRAINING_THREAD = 5.0
_SECONDS_FOR_ANSWERS = 3.0
_num_watches = 0


class JobWatch:
    """While entered, this rank is watched and watches. Every rank of the job enters; one process alone does nothing.

    Args:
        context: this process's place in the mesh.
        timeout_minutes: as ``parallel.timeout_minutes``.

    Raises:
        JobError: on leaving with an exception that another rank's end explains.
    """

    def __init__(self, context: ParallelContext, timeout_minutes: float) -> None:
        self.rank, self.world_size = context.rank, context.world_size
        self.timeout = 60 * timeout_minutes
        # Each rank writes once in this time; the store of a large job is spared.
        self.interval = max(0.5, self.world_size / 500)
        self.host = process_space()
        self._neighbor = _next_rank_of_this_host(self.rank, self.world_size)
        self._stopped = threading.Event()
        self._reporting = threading.Lock()
        self._answered: tuple[float, str] = (0.0, "")
        self._cause_since: float | None = None
        self._explaining = False
        self._old_handler: Any = None

    def __enter__(self) -> JobWatch:
        with contextlib.suppress(AttributeError, OSError, RuntimeError, ValueError):  # stderr without a descriptor
            faulthandler.enable()
        if self.world_size == 1:
            return self
        global _num_watches  # every rank enters as often, so all of them come to the same name
        _num_watches += 1
        # A connection of its own: the training thread may wait on the other one, holding its lock.
        store = dist.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]
        self.store = dist.PrefixStore(f"grit_watch_{_num_watches}", store)
        self._publish()
        if threading.current_thread() is threading.main_thread():
            self._old_handler = signal.signal(signal.SIGTERM, self._on_sigterm)
        self._thread = threading.Thread(target=self._run, name="grit-watch", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.world_size == 1:
            return
        self._explaining = isinstance(error, Exception)
        try:
            if isinstance(error, Exception):
                self._explain(error)
        finally:
            # After an error it stays: SIGTERM may come before the caller has printed what is raised here.
            if not self._explaining and self._old_handler is not None:
                signal.signal(signal.SIGTERM, self._old_handler)
            with contextlib.suppress(RuntimeError):  # the store may have gone with the process that held it
                self.store.set(f"ended/{self.rank}", "")
            self._stopped.set()
            self._thread.join(timeout=2 * _SECONDS_FOR_ANSWERS)

    def _on_sigterm(self, number: int, frame: FrameType | None) -> None:
        """End as SIGTERM ends a process, but say first which rank's end is the reason, if one is."""
        signal.signal(signal.SIGTERM, self._old_handler)
        if self._explaining:  # this process ends by itself, within seconds
            return
        cause = self._wait_for_cause(4 * self.interval)
        if cause is not None:
            print(f"megatron-grit: [rank {self.rank}] ends: {cause}", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGTERM)

    def _explain(self, error: Exception) -> None:
        """Say why this rank ends, where no other rank did before. Returns where the error tells it all by itself."""
        if not is_broken_connection(error):
            first, is_first = self._blame(self.rank, "ended", f"{type(error).__name__}: {_first_line(error)}")
            if isinstance(error, GritError):
                error.is_first = is_first
            elif not is_first:
                raise JobError(f"{first}; this rank too: {type(error).__name__}: {_first_line(error)}") from error
            return
        cause = self._wait_for_cause(_SECONDS_FOR_CAUSE if not is_timeout(error) else 0)
        if cause is None and is_timeout(error):
            with contextlib.suppress(RuntimeError):  # the store has gone
                self._report(f"a collective of rank {self.rank} waited longer than parallel.timeout_minutes")
            cause, _ = self._blame(self.rank, "stuck", "a collective waited longer than parallel.timeout_minutes")
            self._kill_frozen_ranks_of_this_host()
        if cause is None:
            cause, _ = self._blame(self.rank, "ended", f"lost a connection: {_first_line(error)}")
        raise JobError(cause) from None

    def _blame(self, rank: int, kind: str, line: str) -> tuple[str, bool]:
        """Say why the job ends unless it has been said. Returns what counts as the reason, and whether it is new."""
        text = {
            "ended": f"rank {rank} ended: {line}",
            "killed": f"rank {rank} was killed or crashed: {line}",
            "stuck": f"the job is stuck: {line}; the report names every rank's position",
        }[kind]
        try:
            held = self.store.compare_set("cause", "", text).decode()
        except RuntimeError:
            return text, True
        # Two ranks never give the same text, as it has a rank; but one may find what it said itself.
        return held, held == text

    def _cause(self) -> str | None:
        return self.store.get("cause").decode() if self.store.check(["cause"]) else None

    def _wait_for_cause(self, seconds: float) -> str | None:
        deadline = time.monotonic() + seconds
        try:
            while (cause := self._cause()) is None and time.monotonic() < deadline:
                time.sleep(0.05)
        except RuntimeError:
            return "the process that holds the job's key-value store ended"
        return cause

    # --- The thread ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stopped.wait(self.interval):
            try:
                self._publish()
                self._answer()
                if time.monotonic() - positions.current().since > self._patience:
                    self._report(f"rank {self.rank} made no progress for {self._patience:.0f} s")
                if self._cause() is None:
                    self._look_at_neighbor()
                else:
                    self._end_if_training_does_not()
            except RuntimeError:  # the store has gone
                return

    @property
    def _patience(self) -> float:
        """Seconds in one place after which positions are printed: shortly before the collectives give up."""
        return self.timeout - max(2 * self.interval, 0.1 * self.timeout)

    def _publish(self) -> None:
        record = {"host": self.host, "pid": os.getpid(), "time": time.time()} | positions.current().as_record()
        self.store.set(f"position/{self.rank}", json.dumps(record))

    def _record_of(self, rank: int) -> dict[str, Any] | None:
        key = f"position/{rank}"
        return json.loads(self.store.get(key)) if self.store.check([key]) else None

    def _look_at_neighbor(self) -> None:
        record = None if self._neighbor is None else self._record_of(self._neighbor)
        if record is None or record["host"] != self.host or is_alive(record["pid"]):
            return
        assert self._neighbor is not None
        if not self.store.check([f"ended/{self._neighbor}"]):
            place = positions.Position.from_record(record)
            line = f"process {record['pid']} on {socket.gethostname()} is gone; it was last known at {place}"
            self._blame(self._neighbor, "killed", line)

    def _end_if_training_does_not(self) -> None:
        now = time.monotonic()
        self._cause_since = self._cause_since or now
        if now - self._cause_since < _SECONDS_FOR_TRAINING_THREAD:
            return
        print(f"megatron-grit: [rank {self.rank}] ends: {self._cause()}", file=sys.stderr, flush=True)
        os._exit(1)

    # --- The report ---------------------------------------------------------------------------------------------------

    def _report(self, reason: str) -> None:
        """Have all positions and stacks printed by the rank that asks first, once for each place it is stuck at."""
        with self._reporting:
            since = positions.current().since
            if self._answered[0] == since:
                return
            number = str(self.store.add("num_reports_asked", 1))
            if self.store.compare_set("report", "", f"{self.rank}/{number}").decode() != f"{self.rank}/{number}":
                return  # another rank has asked; this one answers
            self._answer()
            deadline = time.monotonic() + _SECONDS_FOR_ANSWERS
            ranks = range(self.world_size)
            keys = [f"answer/{self.rank}/{number}/{rank}" for rank in ranks]
            while not self.store.check(keys) and time.monotonic() < deadline:
                time.sleep(0.05)
            answers = []
            for rank, key in zip(ranks, keys, strict=True):
                stacks = self.store.get(key).decode() if self.store.check([key]) else None
                answers.append(Answer(rank, self._record_of(rank), stacks))
            print(stuck_report(reason, answers), file=sys.stderr, flush=True)
            self.store.set("report", "")  # not deleted: a rank that just saw it there would wait for it

    def _answer(self) -> None:
        """Hand this rank's stacks to the rank that asks for them."""
        asked = self.store.get("report").decode() if self.store.check(["report"]) else ""
        if asked and self._answered[1] != asked:
            self._publish()
            self.store.set(f"answer/{asked}/{self.rank}", stacks_of_this_process())
            self._answered = (positions.current().since, asked)

    def _kill_frozen_ranks_of_this_host(self) -> None:
        """A stopped process would hold up the launcher, whose request to end it never sees."""
        with contextlib.suppress(RuntimeError):
            for rank in range(self.world_size):
                record = self._record_of(rank)
                if record is None or rank == self.rank or record["host"] != self.host:
                    continue
                if time.time() - record["time"] > 4 * self.interval:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(record["pid"], signal.SIGKILL)


def is_broken_connection(error: BaseException) -> bool:
    """Whether an exception is what a collective raises when another rank is gone or late."""
    if isinstance(error, dist.DistError):
        return True
    text = str(error)
    marks = ("gloo", "Gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Broken pipe")
    return isinstance(error, RuntimeError) and (is_timeout(error) or any(mark in text for mark in marks))


def is_timeout(error: BaseException) -> bool:
    """Whether a collective gave up waiting."""
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("timed out" in text or "timeout" in text)


def _next_rank_of_this_host(rank: int, world_size: int) -> int | None:
    local_rank, local_size = (int(os.environ.get(name, "0")) for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    neighbor = (rank + 1) % world_size if local_size < 1 else rank - local_rank + (local_rank + 1) % local_size
    return None if neighbor == rank else neighbor


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
