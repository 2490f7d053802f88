"""Exceptions that a user can cause and repair.

Each message is one line: what was wrong, where, and what to do. The command line prints it without a
traceback and exits with status 2; a library caller catches :class:`GritError`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

EXIT_STATUS = 2


class GritError(Exception):
    """Base of every error that the caller, not the code, has to repair."""

    is_first: bool | None = None
    """In a job of several processes: whether no other rank failed before. None: not known."""


class ConfigError(GritError):
    """A configuration that cannot be run: an unknown key, a wrong value, options that exclude each other."""


class ConfigErrors(ConfigError):
    """Several errors, of which each is a line.

    Args:
        errors: what is wrong.
    """

    def __init__(self, errors: Sequence[GritError]) -> None:
        super().__init__("\n".join(map(str, errors)))
        self.errors = errors


def raise_all(errors: Sequence[GritError]) -> NoReturn:
    """Raise errors as one, or the only one itself.

    Raises:
        GritError: always.
    """
    raise errors[0] if len(errors) == 1 else ConfigErrors(errors)


class MeshError(ConfigError):
    """A parallel layout that the model, the batch or the number of processes does not allow."""


class DataError(GritError):
    """Input data that cannot be used.

    Args:
        message: what is wrong and what to do about it.
        path: the file at fault.
        line: 1-based line in a text file.
        byte: offset in a binary file.
    """

    def __init__(
        self, message: str, *, path: str | Path | None = None, line: int | None = None, byte: int | None = None
    ) -> None:
        self.path, self.line, self.byte = path, line, byte
        where = "" if path is None else str(path)
        if line is not None:
            where += f":{line}"
        if byte is not None:
            where += f" (byte {byte})"
        super().__init__(f"{where}: {message}" if where else message)


class OutputError(DataError):
    """Output that cannot be written: there is no room or no permission, or another process is writing it."""


class CheckpointError(GritError):
    """A checkpoint that is missing, incomplete, or of another model."""


class AuditError(GritError):
    """The start-up audit found that the run would train something else than its configuration says."""


class NumericsError(GritError):
    """A loss or gradient that is not a number, or a start-up check that found wrong numbers."""


class JobError(GritError):
    """This rank ends because of another one, or because none of them moves. It is never the reason itself."""
