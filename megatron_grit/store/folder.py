"""A folder that is written under another name, file by file, and gets its own name when it is whole.

Until then there is ``.NAME.partial`` beside its place, with the files, a lock, and a journal: size and SHA-256 of each
finished file. A killed run resumes: files that are still what the journal says are kept, all others are written again.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from megatron_grit.errors import OutputError
from megatron_grit.store.digest import HashingFile, describe_file, digest_of_settings, is_as_described
from megatron_grit.store.files import replacing, sync_folder, write_json
from megatron_grit.store.lock import locked


class OutputFolder:
    """A context in which one process writes the files of ``target``; :meth:`publish` ends it.

    Args:
        target: the folder; does not exist yet, or is empty.
        identity: what the content follows from, of what JSON can hold. Files of another identity are not kept.
        partial: another name in place of ``.NAME.partial``.

    Attributes:
        path: where the files are until the folder is whole.
        files: "bytes" and "sha256" of each file that was finished, now or earlier.

    Raises:
        OutputError: ``target`` has content, another process is writing it, or a file cannot be written.
    """

    def __init__(self, target: Path, identity: object, *, partial: Path | None = None) -> None:
        _refuse_content(target)
        # A target such as "." or "out/.." has its name only when it is resolved.
        self.target = target.resolve()
        self._work = partial or self.target.with_name(f".{self.target.name}.partial")
        self.path, self._journal = self._work / "files", self._work / "journal.json"
        self._identity = digest_of_settings(identity)
        self.files: dict[str, dict[str, Any]] = {}
        self._stack = ExitStack()

    def __enter__(self) -> OutputFolder:
        with self.naming(self.target), ExitStack() as stack:
            stack.enter_context(locked(self._work / "lock", self.target))
            _refuse_content(self.target)  # another process may have finished it meanwhile
            self.path.mkdir(parents=True, exist_ok=True)
            self.files = self._read_journal()
            self._remove_unfinished()
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.files:  # nothing to resume from
            shutil.rmtree(self._work, ignore_errors=True)
        self._stack.close()

    def _read_journal(self) -> dict[str, dict[str, Any]]:
        with suppress(OSError, ValueError, KeyError, TypeError):
            journal = json.loads(self._journal.read_bytes())
            if journal["identity"] == self._identity:
                return dict(journal["files"])
        return {}

    def _remove_unfinished(self) -> None:
        """Remove all files that are not in the journal."""
        for path in sorted(self.path.rglob("*"), reverse=True):  # what is in a folder before the folder
            if not path.is_dir():
                if path.relative_to(self.path).as_posix() not in self.files:
                    path.unlink()
            elif not any(path.iterdir()):
                path.rmdir()

    def find(self, name: str) -> dict[str, Any] | None:
        """The journal's entry of a file that an earlier run finished; reads the file. None: it has to be written.

        Returns:
            "bytes", "sha256" and what :meth:`add` was given.
        """
        entry = self.files.get(name)
        return entry if entry is not None and is_as_described(self.path / name, entry) else None

    @contextmanager
    def writing(self, name: str) -> Iterator[HashingFile]:
        """A file to write; when the block ends it is on disk and in the journal.

        Raises:
            OutputError: it cannot be written.
        """
        path = self.path / name
        with self.naming(path):
            with replacing(path, "wb") as file:
                hashing = HashingFile(file)
                yield hashing
            sync_folder(path.parent)
            self._note(name, hashing.entry())

    def add(self, name: str, **facts: Any) -> None:
        """Put a file that was written here, and flushed to disk, into the journal.

        Args:
            name: relative to :attr:`path`.
            facts: what :meth:`find` is to tell of it.
        """
        path = self.path / name
        with self.naming(path):
            self._note(name, describe_file(path) | facts)

    def _note(self, name: str, entry: dict[str, Any]) -> None:
        self.files[name] = entry
        write_json(self._journal, {"identity": self._identity, "files": self.files})

    def publish(self) -> None:
        """Give the folder its name. Nothing may be written afterwards."""
        with self.naming(self.target):
            for folder in {self.path} | {path.parent for path in self.path.rglob("*")}:
                sync_folder(folder)
            # Over an empty directory as well; one that was filled meanwhile is an OSError.
            os.rename(self.path, self.target)
            sync_folder(self.target.parent)
            shutil.rmtree(self._work, ignore_errors=True)

    @contextmanager
    def naming(self, path: Path) -> Iterator[None]:
        """Turn an OSError into an error that names the file and says what to do.

        Raises:
            OutputError: in place of an OSError.
        """
        try:
            yield
        except OSError as error:
            where = Path(error.filename or path)
            raise OutputError(
                f"cannot be written ({error.strerror or error}); the same command resumes with the files in "
                f"{self.path}",
                path=where,
            ) from error


def _refuse_content(target: Path) -> None:
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise OutputError("already exists and is not empty; give another directory", path=target)
