"""Standard output and error as a command may find them: closed, a pipe that nobody reads, or of a narrow encoding."""

from __future__ import annotations

import io
import os
import select
import sys
from typing import TextIO


def prepare_streams() -> None:
    """Give closed streams a place to write to; escape characters that standard output's encoding does not have."""
    # Without it, print(..., file=sys.stderr) of a closed standard error goes to standard output.
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")


def drop_closed_outputs() -> bool:
    """Whether nobody reads standard output or error any more, as after ``| head``; what is still to be written there is
    dropped."""
    closed = [stream for stream in (sys.stdout, sys.stderr) if _is_closed(stream)]
    if closed:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in closed:
            os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
    return bool(closed)


def _is_closed(stream: TextIO) -> bool:
    try:
        watch = select.poll()
        watch.register(stream.fileno(), 0)
        return bool(watch.poll(0))
    except (AttributeError, OSError, ValueError):
        return False
