"""A directory that is written under another name, file by file, and takes its real one when it is whole.

Each finished weight file is noted in a journal with its size and SHA-256. What was killed is taken up again: files that
the journal names and that are still what was written are kept, all others are written anew.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

from megatron_grit.errors import CheckpointError
from megatron_grit.store.digest import HashingFile, is_as_described
from megatron_grit.store.files import sync_folder, write_json
from megatron_grit.store.logs import get_logger

if TYPE_CHECKING:
    pass

log = get_logger(__name__)

_JOURNAL, _LOCK = "export.journal.json", ".lock"
_BLOCK = 1 << 20


class ExportFolder:
    """A context in which a directory is written beside ``target``.

    Args:
        target: what it will be called; not there yet, or empty.
        identity: what the files follow from. Files of an export with another identity are not kept.

    Raises:
        CheckpointError: ``target`` holds something, another process is writing it, or a file cannot be written.
    """

    def __init__(self, target: Path, identity: dict[str, Any]) -> None:
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise CheckpointError(f"{target}: is there already and not empty; give another directory")
        # A target such as "." or "out/.." has its name only when it is resolved.
        self.target = target.resolve()
        self.path = self.target.with_name(f".{self.target.name}.partial")
        self._identity = identity
        self._files: dict[str, dict[str, Any]] = {}
        self._lock: IO[str] | None = None

    def __enter__(self) -> ExportFolder:
        with self.naming(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / _LOCK).open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise CheckpointError(f"{self.target}: another process is writing it; wait for it, or end it") from None
        except OSError as error:  # some network file systems have no locks
            log.warning(f"{self.path} cannot be locked ({error.strerror}): see to it that one process writes it")
        with self.naming(self.path):
            self._files = self._noted()
            self._clear()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock is not None:
            self._lock.close()

    def _noted(self) -> dict[str, dict[str, Any]]:
        """Files of a journal of the same export."""
        with suppress(OSError, ValueError, KeyError, TypeError):
            journal = json.loads((self.path / _JOURNAL).read_bytes())
            if journal["identity"] == self._identity:
                return dict(journal["files"])
        return {}

    def _clear(self) -> None:
        """Remove all that no journal speaks for."""
        for path in self.path.iterdir():
            if path.name in self._files or path.name in (_LOCK, _JOURNAL):
                continue
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
        if not self._files:
            (self.path / _JOURNAL).unlink(missing_ok=True)

    def is_whole(self, name: str) -> bool:
        """Whether an earlier attempt wrote this file and it still is what was written."""
        return name in self._files and is_as_described(self.path / name, self._files[name])

    @contextmanager
    def writing(self, name: str) -> Iterator[HashingFile]:
        """A weight file; when the block ends it is on disk and in the journal.

        Raises:
            CheckpointError: it cannot be written.
        """
        path = self.path / name
        temporary = path.with_name(f"{name}.tmp")
        with self.naming(path):
            with temporary.open("wb", buffering=_BLOCK) as file:
                hashing = HashingFile(file)
                yield hashing
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            sync_folder(self.path)
            self._files[name] = hashing.entry()
            write_json(self.path / _JOURNAL, {"identity": self._identity, "files": self._files})

    def publish(self) -> None:
        """Give the directory its name. Nothing may be written afterwards."""
        with self.naming(self.target):
            for folder in {path.parent for path in self.path.rglob("*")}:
                sync_folder(folder)
            (self.path / _JOURNAL).unlink(missing_ok=True)
            (self.path / _LOCK).unlink()
            # Over an empty directory as well; one that was filled meanwhile is an OSError.
            os.rename(self.path, self.target)
            sync_folder(self.target.parent)

    @contextmanager
    def naming(self, path: Path) -> Iterator[None]:
        """Turn an OSError into one that names the file and says what to do.

        Raises:
            CheckpointError: in place of an OSError.
        """
        try:
            yield
        except OSError as error:
            where = error.filename or path
            raise CheckpointError(
                f"{where}: cannot be written ({error.strerror or error}); the same command goes on where this one "
                f"stopped, with the files in {self.path}"
            ) from error
