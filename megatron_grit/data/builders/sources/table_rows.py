"""Rows of raw data sets as they are published: JSON lines, a JSON list, Parquet or a spreadsheet."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

from megatron_grit.compat import needed
from megatron_grit.data.text.lines import filled_lines, read_json
from megatron_grit.errors import DataError

_COMPRESSED = (".gz", ".zst")
SUFFIXES = (".jsonl", ".json", ".parquet", ".xlsx")
"""Of files that can be read; the first two compressed as well."""


class TableRow(NamedTuple):
    """One row of a file."""

    path: Path
    number: int
    """1-based: of the line where a row is one, else of the row."""
    value: dict[str, Any]
    is_line: bool = True

    def error(self, message: str) -> DataError:
        """An error that names the row."""
        if self.is_line:
            return DataError(message, path=self.path, line=self.number)
        return DataError(f"row {self.number}: {message}", path=self.path)

    def text(self, *names: str) -> str:
        """The text under the first of these names that the row has.

        Raises:
            DataError: there is none, or it is no text.
        """
        name = next((name for name in names if name in self.value), None)
        if name is None:
            raise self.error(f"has no {' or '.join(names)}")
        value = self.value[name]
        if not isinstance(value, str):
            raise self.error(f"{name} must be a text")
        return value


def read_rows(path: Path) -> Iterator[TableRow]:
    """The rows of a file, by the end of its name.

    Raises:
        DataError: it cannot be read, or holds something else than rows.
        ConfigError: the library that reads such files is not installed.
    """
    suffix = next((end for end in reversed(path.suffixes) if end not in _COMPRESSED), "")
    if suffix == ".parquet":
        values: Iterator[Any] = _parquet(path)
    elif suffix == ".xlsx":
        values = _spreadsheet(path)
    elif suffix == ".json":
        held = read_json(path)
        if not isinstance(held, list):
            raise DataError("must be a JSON list of objects; name a file of JSON lines .jsonl", path=path)
        values = iter(held)
    else:
        for line in filled_lines(path):
            row = TableRow(path, line.number, line.value())
            if not isinstance(row.value, dict):
                raise row.error("expected a JSON object")
            yield row
        return
    for number, value in enumerate(values, 1):
        row = TableRow(path, number, value, is_line=False)
        if not isinstance(value, dict):
            raise row.error("expected a JSON object")
        yield row


def _parquet(path: Path) -> Iterator[dict[str, Any]]:
    with needed(f"{path}: Parquet needs", "pyarrow", "data"):
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    try:
        with ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=4096):
                yield from batch.to_pylist()
    except (OSError, ArrowException) as error:
        raise DataError(f"cannot be read as Parquet: {str(error).splitlines()[0]}", path=path) from error


def _spreadsheet(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of the first sheet under the names in its first row; empty ones are left out."""
    with needed(f"{path}: a spreadsheet needs", "openpyxl", "data"):
        from openpyxl import load_workbook
    try:
        book = load_workbook(path, read_only=True, data_only=True)
    except (OSError, KeyError, ValueError, BadZipFile) as error:
        raise DataError(f"cannot be read as a spreadsheet: {error}", path=path) from error
    rows = book.worksheets[0].iter_rows(values_only=True)
    names = [str(name) for name in next(rows, ())]
    for cells in rows:
        if any(cell is not None for cell in cells):
            yield {name: "" if cell is None else cell for name, cell in zip(names, cells, strict=False)}
    book.close()
