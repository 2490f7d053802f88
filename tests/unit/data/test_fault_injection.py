"""Damaged files end in the right content or an error that names them: 20,000 cases of benchmarks/fault_injection.py.

And the harness itself can fail: with a check taken out of a reader it finds the case that the check was for.
"""

from __future__ import annotations

import gzip
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO

import pytest

from benchmarks.fault_injection import FAULTS, UnsafeError, indexed_subjects, run_cases, text_subjects
from megatron_grit.data import line_blocks
from megatron_grit.data.indexed import IndexedFile, IndexedRecords


@pytest.mark.parametrize("seed", range(4))
def test_no_unsafe_case(seed: int) -> None:
    subjects = indexed_subjects(seed) + text_subjects(seed)
    counts = Counter(run_cases(subjects, 5000, seed, limit=60))
    assert sum(counts.values()) == 5000
    assert {fault for _, fault, _ in counts} == set(FAULTS)
    refused = {name for name, _, outcome in counts if outcome == "refused"}
    assert refused == {subject.name for subject in subjects}


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
