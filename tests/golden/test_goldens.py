"""What commands make of fixed inputs is what was recorded. ``python -m tests.golden.record`` compares the rest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("faiss")
pytest.importorskip("transformers")

from tests.golden import record as record_module  # noqa: E402
from tests.golden.parts import record  # noqa: E402
from tests.golden.record import compare, differences, reason_to_skip, write  # noqa: E402
from tests.harness.command import python  # noqa: E402

CHEAP = ["indexed", "converted", "database", "imported", "exported", "weight_diff", "flags"]


@pytest.fixture(scope="module")
def found(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return dict(record(repository, tmp_path_factory.mktemp("goldens"), CHEAP, python()))


@pytest.mark.slow
@pytest.mark.parametrize("part", ["inputs", *CHEAP])
def test_nothing_has_changed(part: str, found: dict[str, Any]) -> None:
    lines = compare({part: found[part]})
    assert not lines, "\n".join([*lines, "python -m tests.golden.record shows all of it; --write records it anew"])
    if (reason := reason_to_skip(part)) is not None:
        pytest.skip(reason)


def test_differences_are_told() -> None:
    wanted = {"indexed": {"a.bin": "1", "b.bin": "2"}, "flags": {"train": ["config", "model"]}, "runs": [{"loss": 0.5}]}
    found = {"indexed": {"a.bin": "3", "c.bin": "2"}, "flags": {"train": ["config", "more"]}, "runs": [{"loss": 0.25}]}
    assert list(differences(wanted, found)) == [
        "indexed: a.bin: recorded '1', found '3'",
        "indexed: b.bin: is missing",
        "indexed: c.bin: is new",
        "flags: train: --model is gone",
        "runs[0]: loss: recorded 0.5, found 0.25",
    ]
    assert list(differences(wanted, wanted)) == []
    assert list(differences(["a", "b"], ["a"], "config.yaml")) == ["config.yaml: is missing: b"]


def test_numbers_of_another_processor_are_not_compared(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "recorded.json"
    monkeypatch.setattr(record_module, "recorded_path", lambda: path)
    chunks, vectors = "a/db/merged/train.hdf5", "a/db/versions/0001.json"
    write({"database": {"a": {chunks: "1", vectors: "1"}}})
    both, one = ({"database": {"a": {chunks: digest, vectors: "2"}}} for digest in ("2", "1"))
    assert len(compare(both)) == 2 and reason_to_skip("database") is None
    monkeypatch.setattr(record_module, "arithmetic", lambda: "another")
    assert compare(both) == [f"database: a: {chunks}: recorded '1', found '2'"] and compare(one) == []
    assert "processor" in str(reason_to_skip("database"))
