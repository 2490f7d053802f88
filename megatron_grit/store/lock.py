"""One lock for everything on disk that only one process may write at a time."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from megatron_grit.errors import OutputError
from megatron_grit.store.logs import get_logger

log = get_logger(__name__)


@contextmanager
def locked(path: Path, target: Path, *, shared: bool = False, wait: bool = False) -> Iterator[None]:
    """Hold a lock file until the block ends. The kernel releases the lock of a process that dies.

    Where the file system has no locks a warning says so, and nothing is held; not with ``wait``, for callers that are
    right without a lock.

    Args:
        path: the lock file. It and its folder are made where they are missing, and stay.
        target: what the lock is for, as messages name it.
        shared: others may hold it as well, if they too ask for it shared.
        wait: until it is free.

    Raises:
        OutputError: another process holds it; says which, where it holds the lock alone.
        OSError: the lock file cannot be made.
    """
    mode = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:
            continue  # whoever held it removed the folder just now
        try:
            try:
                fcntl.flock(descriptor, mode)
            except BlockingIOError:
                raise OutputError(
                    f"another process is writing it{_holder(descriptor)}; wait for it or end it", path=target
                ) from None
            except OSError as error:
                if not wait:
                    log.warning(f"{target}: cannot be locked ({error.strerror}); make sure that nothing else writes it")
            # Whoever held it may have removed the file, and others would then lock another one.
            if _is_at(descriptor, path):
                with _named(descriptor, shared):
                    yield
                return
        finally:
            os.close(descriptor)


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Hold a folder that one command may write at a time; it is made where it is missing.

    Raises:
        OutputError: another process holds it, or it cannot be written.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(folder / ".lock", folder))
        except OSError as error:
            raise OutputError(f"cannot be written ({error.strerror})", path=folder) from None
        yield


@contextmanager
def _named(descriptor: int, shared: bool) -> Iterator[None]:
    """Have the lock file say who holds it. One who is killed leaves a name, which the next holder replaces."""
    with suppress(OSError):  # a full disk
        os.truncate(descriptor, 0)
        if not shared:
            os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
    try:
        yield
    finally:
        with suppress(OSError):
            if not shared:
                os.truncate(descriptor, 0)


def _holder(descriptor: int) -> str:
    with suppress(OSError):
        if name := os.pread(descriptor, 300, 0).decode(errors="replace"):
            return f" ({name})"
    return ""


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
