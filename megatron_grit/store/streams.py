"""Standard output and error as a command may find them: closed, a pipe that nobody reads, or of a narrow encoding."""

from __future__ import annotations

import io
import os
import select
import sys


def prepare_streams() -> None:
    """Give closed streams a place to write to; escape characters that standard output's encoding does not have."""
    # Without it, print(..., file=sys.stderr) of a closed standard error goes to standard output.
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")


def drop_closed_output() -> bool:
    """Whether nobody reads standard output any more, as after ``| head``; what is still to be written is dropped."""
    try:
        watch = select.poll()
        watch.register(sys.stdout.fileno(), 0)
        if not watch.poll(0):
            return False
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
    except (AttributeError, OSError, ValueError):
        return False
    return True
