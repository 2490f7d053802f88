"""Sealed JSON: any flip of any bit is refused, or leaves what it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_grit.store.sealed import read_sealed, seal, unseal, write_sealed

VALUES = {"name": "näme", "count": 3, "share": 0.1, "parts": [{"sha256": "ab", "bytes": 1}], "none": None}


def test_what_was_written_is_read(tmp_path: Path) -> None:
    write_sealed(tmp_path / "a.json", VALUES)
    assert read_sealed(tmp_path / "a.json") == VALUES and unseal(seal(VALUES)) == VALUES
    assert unseal(VALUES) == VALUES, "of an earlier version"


def test_every_flip(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_sealed(path, VALUES)
    whole, refused = path.read_bytes(), 0
    for bit in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            found = read_sealed(path)
        except ValueError:
            refused += 1
            continue
        # A damaged name of the checksum is a key that no reader knows.
        assert {key: value for key, value in found.items() if key in VALUES} == VALUES
        assert found == VALUES or len(found) == len(VALUES) + 1
    assert refused > 7 * len(whole)


@pytest.mark.parametrize("text", ["[]", "3", "null", "{"])
def test_what_is_no_object(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match="no object|Expecting"):
        read_sealed(tmp_path / "a.json")
    assert json.loads(json.dumps(seal({})))["checksum"]
