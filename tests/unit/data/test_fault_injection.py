"""Damaged files end in the right content or an error that names them: 6,000 cases of benchmarks/fault_injection.py.

And the harness itself can fail: with a check taken out of a reader it finds the case that the check was for.
"""

from __future__ import annotations

import gzip
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import IO

import pytest

from benchmarks.fault_injection import (
    FAULTS,
    UnsafeError,
    all_subjects,
    cache_subjects,
    indexed_subjects,
    run_cases,
    text_subjects,
)
from megatron_grit.data.indexed.reader import IndexedFile
from megatron_grit.data.indexed.records import IndexedRecords
from megatron_grit.data.text import line_blocks
from megatron_grit.store import cache as index_cache


@pytest.mark.parametrize("seed", range(4))
def test_no_unsafe_case(seed: int) -> None:
    subjects = all_subjects(seed)
    counts = Counter(run_cases(subjects, 1500, seed, limit=60))
    assert sum(counts.values()) == 1500
    assert {fault for _, fault, _ in counts} == set(FAULTS)
    refused = {name for name, _, outcome in counts if outcome == "refused"}
    assert refused == {subject.name for subject in subjects} - {"index cache"}  # which is built again


def _unchecked_extent(self: IndexedFile, start: int, stop: int) -> tuple[int, int]:
    begin = int(self.pointers[start])
    return begin, begin + self.dtype.itemsize * int(self.lengths[start:stop].sum())


@pytest.mark.parametrize(
    ("owner", "name", "broken", "message"),
    [
        (IndexedFile, "_extent", _unchecked_extent, "other content was read|Error: "),
        (IndexedRecords, "verify", lambda self: None, "not even the checksums noticed"),
    ],
    ids=["pointers", "checksums"],
)
def test_a_missing_check_is_seen(
    monkeypatch: pytest.MonkeyPatch, owner: type, name: str, broken: object, message: str
) -> None:
    monkeypatch.setattr(owner, name, broken)
    with pytest.raises(UnsafeError, match=message):
        for _ in run_cases(indexed_subjects(0), 5000, seed=0):
            pass


def test_a_cache_that_is_trusted_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every digest is the same, in the header and of the file."""
    same, header = b"?" * 32, index_cache._HEADER

    def digest_of(file: IO[bytes], name: str) -> SimpleNamespace:
        file.seek(0, 2)
        return SimpleNamespace(digest=lambda: same)

    def unpack(content: bytes) -> tuple[bytes, bytes, int]:
        magic, _, length = header.unpack(content)
        return magic, same, length

    monkeypatch.setattr(index_cache.hashlib, "file_digest", digest_of)
    monkeypatch.setattr(index_cache, "_HEADER", SimpleNamespace(size=header.size, pack=header.pack, unpack=unpack))
    with pytest.raises(UnsafeError, match="index cache, "):
        for _ in run_cases(cache_subjects(0), 500, seed=0):
            pass


def test_a_reader_that_forgives_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gzip reader that takes the end of the file for the end of the text."""

    def forgiving(raw: IO[bytes], path: Path) -> Iterator[bytes]:
        with suppress(Exception), gzip.GzipFile(fileobj=raw) as stream:
            while piece := stream.read(100):
                yield piece

    monkeypatch.setitem(line_blocks._OPENERS, ".gz", forgiving)
    with pytest.raises(UnsafeError, match="gzip, .* other content was read"):
        for _ in run_cases(text_subjects(0), 5000, seed=0):
            pass
