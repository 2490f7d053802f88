"""How a command that fails says so: one line for what a user can repair, one traceback for the rest, in a whole job."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any

from megatron_grit.errors import EXIT_STATUS, GritError, JobError
from megatron_grit.store.environment import job_rank, job_size, leave_job, restart_line
from megatron_grit.store.logs import configure_logging, get_logger
from megatron_grit.store.streams import drop_closed_outputs, prepare_streams

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_SECONDS_FOR_THE_FIRST = 5.0
_SECONDS_FOR_LAUNCHER = 2.0


def guarded(
    step: Callable[[], object], prog: str = "megatron-grit", resumes: bool = False, joins_job: bool = False
) -> int:
    """Run ``step`` and turn an error of the user's into one line. Returns the exit status.

    Args:
        step: what the command does.
        prog: its name.
        resumes: the same command resumes after an interrupt.
        joins_job: it takes part in a launcher's job, and checks the launcher's variables itself. Other commands run
            alone where the variables are left over from something else.
    """
    prepare_streams()
    problem = None if joins_job else leave_job()
    configure_logging()
    if problem is not None:
        get_logger(__name__).info(f"runs alone: {problem}")
    if joins_job and (line := restart_line()) is not None:
        get_logger(__name__).info(f"{line}: all processes start again")
    signals = _Signals()
    try:
        with signals:
            try:
                step()
            finally:
                sys.stdout.flush()
    except (Exception, KeyboardInterrupt) as error:
        # Code that a signal ends in the middle may raise something else in its place: an import says that what it
        # imports is broken.
        number = error.number if isinstance(error, _Ended) else signals.number
        is_closed = drop_closed_outputs()
        if number is not None or isinstance(error, KeyboardInterrupt):
            if job_rank() == 0:  # all ranks are told at once
                how = "terminated" if number == signal.SIGTERM else "interrupted"
                _say(f"{prog}: {how}{'; the same command resumes' * resumes}")
            return 128 + (number or signal.SIGINT)
        if isinstance(error, BrokenPipeError) and is_closed:
            return 128 + signal.SIGPIPE
        return tell(error, prog)
    return 0


class _Ended(KeyboardInterrupt):
    """A signal. Not KeyboardInterrupt itself: where that leaves a call of exec, as in namedtuple, Python ends the
    process by SIGINT whatever its status is.

    Args:
        number: which.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


class _Signals:
    """While entered, the first SIGINT or SIGTERM ends the command, and what is half written is removed; a second one
    acts as always, on a command that takes its time.

    SIGTERM not in a job, whose ranks the launcher ends by it when one has failed; neither in processes that are forked
    from this one, nor where somebody has another use for it.

    Attributes:
        number: the signal that came.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._owner = os.getpid()
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            usual: dict[int, Any] = {signal.SIGINT: signal.default_int_handler}
            if job_size() == 1:
                usual[signal.SIGTERM] = signal.SIG_DFL
            self._handlers = {number: usual[number] for number in usual if signal.getsignal(number) is usual[number]}
        for number in self._handlers:
            signal.signal(number, self._end)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._handlers.items():
            if signal.getsignal(number) in (self._end, signal.SIG_DFL):
                signal.signal(number, handler)

    def _end(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:
            signal.signal(number, self._handlers[number])
            signal.raise_signal(number)
            return
        for each in self._handlers:
            signal.signal(each, signal.SIG_DFL)
        self.number = number
        raise _Ended(number)


def tell(error: Exception, prog: str) -> int:
    """Print an exception that ends this process. Returns the exit status.

    In a job of several processes one rank speaks where all have the same to say: the rank that failed first where that
    is known, else rank 0. The others wait; the launcher ends them meanwhile. Ranks that end because of another one say
    so in a line, and give the launcher time to see that one's end first.
    """
    rank = job_rank()
    mark = f"[rank {rank}] " if job_size() > 1 else ""
    if isinstance(error, JobError):
        _say(f"{prog}: {mark}ends: {error}")
        time.sleep(_SECONDS_FOR_LAUNCHER)
        write_error_file(error)  # the launcher takes the oldest for the root cause
        return 1
    write_error_file(error)
    if isinstance(error, GritError) or _is_of_a_file(error):
        is_first = getattr(error, "is_first", None)
        if not is_first and (rank or is_first is not None):
            time.sleep(_SECONDS_FOR_THE_FIRST)
        for each in getattr(error, "errors", [error]):
            _say(f"{prog}: error: {mark if rank else ''}{each}")
        return EXIT_STATUS
    lines = "".join(traceback.format_exception(error)).splitlines()
    _say("\n".join(f"{mark}{line}" for line in lines))
    return 1


def _say(text: str) -> None:
    with suppress(OSError):  # nobody reads standard error either
        print(text, file=sys.stderr, flush=True)


def _is_of_a_file(error: Exception) -> bool:
    """Whether an error says all that a user needs: a file that cannot be opened, or a full disk."""
    return isinstance(error, OSError) and (bool(error.filename) or error.errno in _FULL)


def write_error_file(error: Exception) -> None:
    """Give torchrun the line that its summary shows for this rank, where it asks for one."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return
    line = f"{type(error).__name__}: {error}"
    extra = {"py_callstack": line, "timestamp": str(int(time.time()))}
    try:
        with open(path, "w", encoding="utf-8") as file:
            json.dump({"message": {"message": line, "extraInfo": extra}}, file)
    except OSError:  # the launcher is gone, and with it whoever would read this
        return
