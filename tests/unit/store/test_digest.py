"""Digests are in files that exist: the values here must never change."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path

import numpy as np
import pytest

from megatron_grit.store import digest as digests
from megatron_grit.store.cache import cache_path
from megatron_grit.store.digest import (
    HashingFile,
    describe_file,
    digest_of_arrays,
    digest_of_files,
    digest_of_rows,
    digest_of_settings,
    is_as_described,
    sha256_of_file,
)

CONTENT = bytes(range(256)) * 3


def test_settings_have_the_digests_that_are_on_disk(tmp_path: Path) -> None:
    settings = {"b": [1, 2.5, None], "a": {"y": True, "x": "ü"}}
    text = b'{"a": {"x": "\\u00fc", "y": true}, "b": [1, 2.5, null]}'
    assert digest_of_settings(settings) == hashlib.sha256(text).hexdigest()
    assert digest_of_settings({"a": {"x": "ü", "y": True}, "b": [1, 2.5, None]}) == hashlib.sha256(text).hexdigest()
    assert digest_of_settings([1, "a"]) == hashlib.sha256(b'[1, "a"]').hexdigest()
    versioned = hashlib.sha256(b'{"seed": 1, "version": 1}').hexdigest()
    assert cache_path(tmp_path, "rows", {"seed": 1}).name == f"rows-{versioned[:24]}.cache"


def test_arrays_and_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = {"b": np.arange(6, dtype="<i4").reshape(2, 3), "a": np.empty((0, 4), np.float32)}
    expected = b"a <f4 (0, 4)\n" + b"b <i4 (2, 3)\n" + arrays["b"].tobytes()
    assert digest_of_arrays(arrays) == hashlib.sha256(expected).hexdigest()
    rows = np.arange(40, dtype="<i8").reshape(10, 4)
    expected = b"x" + rows.tobytes() + rows[:, 0].tobytes()
    for size in (1, 64, 1 << 24):
        monkeypatch.setattr(digests, "_BLOCK_BYTES", size)
        assert digest_of_rows(rows, rows[:, 0], prefix=b"x") == hashlib.sha256(expected).hexdigest()
    assert digest_of_rows(rows[:0]) == hashlib.sha256().hexdigest()


def test_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a" / "b"
    path.parent.mkdir()
    path.write_bytes(CONTENT)
    whole = hashlib.sha256(CONTENT).hexdigest()
    for size in (7, 1 << 24):
        monkeypatch.setattr(digests, "_BLOCK_BYTES", size)
        parts: list[int] = []
        assert sha256_of_file(path) == sha256_of_file(path, report=parts.append) == whole
        assert sum(parts) == len(CONTENT) and max(parts) <= size
        assert sha256_of_file(path, 100) == hashlib.sha256(CONTENT[:100]).hexdigest()
        assert sha256_of_file(path, 10**6) == whole
        text = json.dumps({"k": 1}) + f"\na/b {len(CONTENT)}\n"
        expected = hashlib.sha256(text.encode() + CONTENT).hexdigest()
        assert digest_of_files(tmp_path, [tmp_path / "gone", path, path], {"k": 1}) == expected
    entry = describe_file(path)
    assert entry == {"bytes": len(CONTENT), "sha256": whole} and is_as_described(path, entry)
    path.write_bytes(CONTENT[:-1] + b"?")
    assert not is_as_described(path, entry)
    path.write_bytes(CONTENT + b"?")
    assert not is_as_described(path, entry) and not is_as_described(tmp_path / "gone", entry)


def test_what_is_written_is_hashed() -> None:
    file = io.BytesIO()
    both = [HashingFile(file, prefix=b"head"), HashingFile(None, prefix=b"head")]
    for hashing in both:
        assert hashing.write(CONTENT) == len(CONTENT)
        assert hashing.write(np.arange(4, dtype="<i8").data) == 32
    written = CONTENT + np.arange(4, dtype="<i8").tobytes()
    assert file.getvalue() == written
    expected = hashlib.sha256(b"head" + written)
    assert [hashing.entry() for hashing in both] == [{"bytes": len(written), "sha256": expected.hexdigest()}] * 2
    assert both[0].digest() == expected.digest()
