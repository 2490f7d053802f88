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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from megatron_grit.errors import EXIT_STATUS, GritError, JobError
from megatron_grit.store.environment import job_rank, job_size, leave_job
from megatron_grit.store.logs import configure_logging, get_logger
from megatron_grit.store.streams import drop_closed_output, prepare_streams

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
    try:
        with _terminable():
            try:
                step()
            finally:
                sys.stdout.flush()
    except KeyboardInterrupt as error:
        if job_rank() == 0:  # all ranks are told at once
            how = "terminated" if isinstance(error, _Terminated) else "interrupted"
            print(f"{prog}: {how}{'; the same command resumes' * resumes}", file=sys.stderr)
        return 128 + (signal.SIGTERM if isinstance(error, _Terminated) else signal.SIGINT)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and drop_closed_output():
            return 128 + signal.SIGPIPE
        return tell(error, prog)
    return 0


class _Terminated(KeyboardInterrupt):
    """SIGTERM."""


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends a process as Ctrl-C does, so that what is half written is removed; a second one acts as always.

    Not in a job, whose ranks the launcher ends by SIGTERM when one has failed; not in processes that are forked from
    this one, and not where somebody has another use for it.
    """
    is_mine = job_size() == 1 and threading.current_thread() is threading.main_thread()
    if not is_mine or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    owner = os.getpid()

    def end(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        if os.getpid() != owner:
            signal.raise_signal(number)
        raise _Terminated

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGTERM) is end:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def tell(error: Exception, prog: str) -> int:
    """Print an exception that ends this process. Returns the exit status.

    In a job of several processes one rank speaks where all have the same to say: the rank that failed first where that
    is known, else rank 0. The others wait; the launcher ends them meanwhile. Ranks that end because of another one say
    so in a line, and give the launcher time to see that one's end first.
    """
    rank = job_rank()
    mark = f"[rank {rank}] " if job_size() > 1 else ""
    if isinstance(error, JobError):
        print(f"{prog}: {mark}ends: {error}", file=sys.stderr, flush=True)
        time.sleep(_SECONDS_FOR_LAUNCHER)
        write_error_file(error)  # the launcher takes the oldest for the root cause
        return 1
    write_error_file(error)
    if isinstance(error, GritError) or _is_of_a_file(error):
        is_first = getattr(error, "is_first", None)
        if not is_first and (rank or is_first is not None):
            time.sleep(_SECONDS_FOR_THE_FIRST)
        for each in getattr(error, "errors", [error]):
            print(f"{prog}: error: {mark if rank else ''}{each}", file=sys.stderr, flush=True)
        return EXIT_STATUS
    text = "".join(traceback.format_exception(error))
    print("".join(f"{mark}{line}" for line in text.splitlines(keepends=True)), file=sys.stderr, end="", flush=True)
    return 1


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
