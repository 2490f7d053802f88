"""A function applied to a stream of tasks by several processes, results in order.

The processes are spawned, so nothing of the caller's threads or libraries is inherited. Each has a pipe of its own and
one task at a time: a process that dies is noticed at once, and processes whose parent dies read the end of their pipe
and leave. The number of results that wait for an earlier one is bounded, and with it the memory.
"""

from __future__ import annotations

import multiprocessing
import signal
import threading
import traceback
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Generic, TypeVar

from megatron_grit.errors import DataError, GritError

Task = TypeVar("Task")
Result = TypeVar("Result")

_JOIN_SECONDS = 5.0


def map_ordered(
    tasks: Iterator[Task], factory: Callable[[], Callable[[Task], Result]], workers: int
) -> Generator[tuple[Task, Result], None, None]:
    """Apply ``factory()`` to every task.

    Args:
        tasks: read as processes become free, never far ahead.
        factory: makes the function, once in each process; picklable.
        workers: processes. 1 works in this process.

    Yields:
        Each task and its result, in the order of the tasks. Close the iterator to end the processes.

    Raises:
        GritError: raised by a process, as it is.
        DataError: a process died.
        RuntimeError: any other exception in a process, with its traceback as text.
    """
    if workers == 1:
        function = factory()
        for task in tasks:
            yield task, function(task)
        return
    pool = _Pool(factory, workers)
    try:
        yield from pool.map(tasks)
        pool.close()
    finally:
        pool.kill()


class _Worker(Generic[Task]):
    def __init__(self, process: BaseProcess, connection: Connection) -> None:
        self.process = process
        self.connection = connection
        self.task: tuple[int, Task] | None = None
        """Number of the task in hand, and the task."""


class _Pool(Generic[Task, Result]):
    def __init__(self, factory: Callable[[], Callable[[Task], Result]], workers: int) -> None:
        self._context = multiprocessing.get_context("spawn")
        self._factory = factory
        self._limit = workers
        self._window = 2 * workers + 2  # tasks that are under way or wait for an earlier one
        self._workers: list[_Worker[Task]] = []
        self._done: dict[int, tuple[Task, Result]] = {}

    def map(self, tasks: Iterator[Task]) -> Iterator[tuple[Task, Result]]:
        num_sent = num_yielded = 0
        exhausted = False
        while True:
            while not exhausted and num_sent - num_yielded < self._window:
                worker = self._idle_worker()
                if worker is None:
                    break
                try:
                    task = next(tasks)
                except StopIteration:
                    exhausted = True
                    break
                self._send(worker, num_sent, task)
                num_sent += 1
            waiting = num_yielded not in self._done
            if waiting and num_yielded == num_sent:
                return
            self._receive(None if waiting else 0.0)
            if not waiting:
                yield self._done.pop(num_yielded)
                num_yielded += 1

    def _idle_worker(self) -> _Worker[Task] | None:
        for worker in self._workers:
            if worker.task is None:
                return worker
        if len(self._workers) == self._limit:
            return None
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(theirs, self._factory), daemon=True)
        resource_tracker.ensure_running()  # would otherwise be started within, and unblock
        with _interrupts_wait():
            process.start()
            self._workers.append(_Worker(process, ours))
        theirs.close()  # so that the end of the process is the end of the pipe
        return self._workers[-1]

    def _send(self, worker: _Worker[Task], number: int, task: Task) -> None:
        worker.task = (number, task)
        try:
            worker.connection.send(task)
        except OSError as error:
            raise self._death(worker) from error

    def _receive(self, timeout: float | None) -> None:
        busy = {worker.connection: worker for worker in self._workers if worker.task is not None}
        for connection in wait(list(busy), timeout):
            assert isinstance(connection, Connection)
            worker = busy[connection]
            try:
                failure, value = connection.recv()
            except (EOFError, OSError) as error:
                raise self._death(worker) from error
            if isinstance(failure, GritError):
                raise failure
            if failure is not None:
                raise RuntimeError(f"a worker process failed:\n{failure}")
            assert worker.task is not None
            number, task = worker.task
            self._done[number] = (task, value)
            worker.task = None

    def _death(self, worker: _Worker[Task]) -> DataError:
        worker.process.join(_JOIN_SECONDS)
        code = worker.process.exitcode
        how = f"by signal {-code}" if code is not None and code < 0 else f"with exit status {code}"
        return DataError(
            f"a worker process ended {how}, often for lack of memory; "
            "start the same command again, with fewer workers if need be: it resumes"
        )

    def close(self) -> None:
        """Let the processes end."""
        for worker in self._workers:
            worker.connection.close()
        for worker in self._workers:
            worker.process.join(_JOIN_SECONDS)

    def kill(self) -> None:
        """End the processes that still run."""
        for worker in self._workers:
            if worker.process.is_alive():
                worker.process.kill()
        for worker in self._workers:
            worker.process.join(_JOIN_SECONDS)
            worker.connection.close()


@contextmanager
def _interrupts_wait() -> Iterator[None]:
    """Ctrl-C reaches every process, and this one answers it: when the block has ended.

    A process that is started in the block inherits what is blocked, from its first moment. Blocking is not enough here:
    another thread may take the signal, and Python raises KeyboardInterrupt in the main thread all the same, perhaps
    before the new process was told what to run.
    """
    came = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal came
        came = True

    in_main_thread = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGINT)
    if in_main_thread and handler is not None:  # None: one that Python did not set, and cannot set again
        signal.signal(signal.SIGINT, note)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if in_main_thread and handler is not None:
            signal.signal(signal.SIGINT, handler)
        if came:
            signal.raise_signal(signal.SIGINT)


def _serve(connection: Connection, factory: Callable[[], Callable[[Task], Result]]) -> None:
    """Body of a process: read a task, write its result, until the pipe ends."""
    function: Callable[[Task], Result] | None = None
    while True:
        try:
            task = connection.recv()
        except (EOFError, OSError):
            return
        failure: GritError | str | None = None
        value: Result | None = None
        try:
            if function is None:
                function = factory()
            value = function(task)
        except GritError as error:
            failure = error
        except Exception:
            failure = traceback.format_exc()
        try:
            connection.send((failure, value))
        except OSError:
            return  # the parent is gone
