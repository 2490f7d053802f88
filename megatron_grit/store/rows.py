"""Files that are written row by row, arrays and texts; a killed run resumes from the rows that are there.

Until one is whole there is ``.NAME.partial`` beside its place, with the rows, a lock, and a journal: how many rows are
on disk, their SHA-256, and the identity of all that they follow from. Memory does not depend on the number of rows.
"""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import islice
from pathlib import Path
from tokenize import TokenError
from types import TracebackType
from typing import BinaryIO, Self

import numpy as np

from megatron_grit.errors import OutputError
from megatron_grit.store.digest import HashingFile, digest_of_settings
from megatron_grit.store.files import replacing, sync_folder, write_json
from megatron_grit.store.lock import locked
from megatron_grit.store.logs import get_logger
from megatron_grit.store.progress import Progress, plural

log = get_logger(__name__)

_BYTES = 1 << 24


def read_rows(path: Path, dtype: type, *, mapped: bool = False) -> np.ndarray:
    """The array of a .npy file.

    Args:
        path: the file.
        dtype: of its numbers; a checksum of them does not tell a header that says another one.
        mapped: leave it on disk; one without rows is read all the same.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no .npy file, or a damaged one, or one of another type.
    """
    try:
        array = np.load(path, mmap_mode="r" if mapped else None, allow_pickle=False)
    except (SyntaxError, TokenError, TypeError, OverflowError, MemoryError, EOFError) as error:  # of a damaged header
        raise ValueError(f"is damaged ({str(error)[:100]})") from None
    if array.dtype != dtype:
        raise ValueError(f"holds {array.dtype} and not {np.dtype(dtype)}")
    return np.asarray(array)


class _PartialFile:
    """A context in which one process writes the rows of ``target``; :meth:`publish` ends it.

    Args:
        target: the file. One that is there stays until it is replaced.

    Attributes:
        folder: for further files of the run, until the target is whole.
        num_rows: rows on disk, now or from an earlier run; 0 before :meth:`resume`.

    Raises:
        OutputError: another process is writing it, or it cannot be written.
    """

    _ROWS: str
    """Name of the rows within the folder."""

    def __init__(self, target: Path) -> None:
        self.target = target
        self.folder = target.with_name(f".{target.name}.partial")
        self.num_rows = 0
        self._identity, self._total, self._offset = "", 0, 0
        self._file: BinaryIO | None = None
        self._hashing = HashingFile(None)
        self._stack = ExitStack()

    @property
    def _rows(self) -> Path:
        return self.folder / self._ROWS

    @property
    def _journal(self) -> Path:
        return self.folder / "journal.json"

    def __enter__(self) -> Self:
        with self._naming(), ExitStack() as stack:
            stack.enter_context(locked(self.folder / "lock", self.target))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
        if not self._journal.exists():  # nothing to resume from
            shutil.rmtree(self.folder, ignore_errors=True)
        self._stack.close()

    def resume(self, identity: object, num_rows: int) -> None:
        """Find the rows that an earlier run of the same identity wrote.

        Args:
            identity: what the rows follow from, of what JSON can hold.
            num_rows: of the whole file.

        Raises:
            OutputError: the file cannot be written.
        """
        self._identity, self._total = digest_of_settings([identity, num_rows]), num_rows
        with self._naming():
            self._file = self._rows.open("r+b") if self._rows.exists() else self._rows.open("w+b")
            if not self._take_over():
                self._file.seek(0)
                self._file.truncate()
                self._hashing = HashingFile(self._file)
                self._journal.unlink(missing_ok=True)

    def _take_over(self) -> bool:
        """Go to the end of the rows that the journal tells of; False where there are none, or other ones."""
        assert self._file is not None
        with suppress(OSError, ValueError, KeyError, TypeError):
            journal = json.loads(self._journal.read_bytes())
            if journal["identity"] != self._identity:
                return False
            hashing, left = HashingFile(None), int(journal["bytes"])
            while left and (piece := self._file.read(min(left, _BYTES))):
                hashing.write(piece)
                left -= len(piece)
            if left or hashing.digest().hex() != journal["sha256"]:
                log.warning(f"{self._rows}: is damaged, so it is written again")
                return False
            self._file.truncate()
            self._hashing, self.num_rows = hashing.into(self._file), int(journal["rows"])
            return True
        return False

    def _append(self, rows: Iterable[bytes | memoryview], count: int) -> None:
        """Write ``count`` more rows, and flush them to disk."""
        assert self._file is not None
        with self._naming():
            for piece in rows:
                self._hashing.write(piece)
            self._file.flush()
            os.fsync(self._file.fileno())
            self.num_rows += count
            entry = {"identity": self._identity, "rows": self.num_rows}
            write_json(self._journal, entry | self._hashing.entry())

    def publish(self) -> None:
        """Give the file its name. All rows are there."""
        assert self._file is not None and self.num_rows == self._total
        with self._naming():
            self._file.close()
            self._place()
            sync_folder(self.target.parent)
            shutil.rmtree(self.folder, ignore_errors=True)

    def _place(self) -> None:
        os.replace(self._rows, self.target)

    @contextmanager
    def _naming(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OutputError(
                f"cannot be written ({error.strerror or error}); the same command resumes with the rows in "
                f"{self.folder}",
                path=self.target,
            ) from error


class RowFile(_PartialFile):
    """A .npy file; see the base class."""

    _ROWS = "rows.npy"

    def append(self, rows: np.ndarray) -> None:
        """Write rows, and flush them to disk.

        Args:
            rows: [any number, row size], of the same type and size each time.

        Raises:
            OutputError: they cannot be written.
        """
        header = io.BytesIO()
        if not self.num_rows:
            shape = (self._total, *rows.shape[1:])
            said = {"descr": rows.dtype.str, "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(header, said)
        self._append([header.getvalue(), np.ascontiguousarray(rows).data.cast("B")], len(rows))


class LineFile(_PartialFile):
    """A file of lines of UTF-8 text, compressed where its name ends in ``.gz``; see the base class."""

    _ROWS = "lines"

    def append(self, lines: Sequence[str]) -> None:
        """Write lines, and flush them to disk.

        Args:
            lines: without their ends.

        Raises:
            OutputError: they cannot be written.
        """
        self._append(("".join(f"{line}\n" for line in lines).encode(),), len(lines))

    def fill(
        self,
        identity: object,
        num_rows: int,
        made: Callable[[int], Iterable[Sequence[str]]],
        doing: str,
        unit: str,
    ) -> None:
        """Write all lines that an earlier run of the same identity has not, some at a time, and show how far it is.

        Args:
            identity: as of :meth:`resume`.
            num_rows: likewise.
            made: from the number of the first line that is missing, gives them in their order, those that are to be on
                disk together as one item.
            doing: what takes the time.
            unit: what a line is.

        Raises:
            OutputError: they cannot be written.
        """
        self.resume(identity, num_rows)
        if self.num_rows:
            log.info(f"{self.target}: resumes after {self.num_rows:,} of {num_rows:,} {plural(unit)}")
        with Progress(num_rows, doing, unit) as progress:
            progress.skip(self.num_rows)
            for lines in made(self.num_rows):
                self.append(lines)
                progress.update(len(lines))

    def lines(self) -> Iterator[str]:
        """Those on disk, without their ends."""
        with self._rows.open(encoding="utf-8", newline="\n") as file:
            yield from (line.removesuffix("\n") for line in islice(file, self.num_rows))

    def _place(self) -> None:
        if self.target.suffix != ".gz":
            return super()._place()
        with replacing(self.target) as file:
            file.writelines(f"{line}\n" for line in self.lines())
