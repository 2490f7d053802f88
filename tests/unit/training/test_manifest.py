"""Manifests: any number of ranks writes the same one, and every change of a file is found by one of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_grit.errors import CheckpointError
from megatron_grit.training import manifest
from megatron_grit.training.manifest import verify_manifest, write_manifest, write_part


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks take turns in one process."""
    monkeypatch.setattr(manifest, "any_rank", lambda flag, context: flag)


def ranks(world_size: int) -> list[Any]:
    return [SimpleNamespace(rank=rank, world_size=world_size) for rank in range(world_size)]


def make(folder: Path, world_size: int = 2) -> Path:
    """Files that ranks wrote in turn, and one that none of them speaks of."""
    contents = {"state.json": b"{}", "weights/a": b"x" * 999, "weights/b": b"", "optimizer/a": b"yy"}
    contents["config.yaml"] = b"c"
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    written = [folder / name for name in contents if name != "config.yaml"]
    for rank in range(world_size):
        write_part(folder, written[rank::world_size], rank)
    write_manifest(folder, world_size)
    return folder


def test_does_not_depend_on_the_number_of_ranks(tmp_path: Path) -> None:
    contents = [(make(tmp_path / str(size), size) / "manifest.json").read_bytes() for size in (1, 2, 7)]
    assert len(set(contents)) == 1 and b"weights/b" in contents[0] and b"config.yaml" in contents[0]
    assert not list((tmp_path / "7").glob(".*"))
    for context in ranks(3):
        verify_manifest(tmp_path / "1", context)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "weights/a").write_bytes(b"x" * 998 + b"y"), "weights/a: is damaged"),
        (lambda folder: (folder / "weights/a").write_bytes(b"x" * 998), "weights/a: has 998 bytes, 999 were written"),
        (lambda folder: (folder / "weights/b").unlink(), "weights/b: is missing"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "manifest.json: cannot be read"),
        (lambda folder: (folder / "manifest.json").write_text('{"files": {"weights/a": 3}}'), "cannot be read"),
    ],
)
def test_every_change_is_found_by_one_rank(tmp_path: Path, change: Callable[[Path], Any], message: str) -> None:
    change(make(tmp_path))
    found = []
    for context in ranks(2):
        try:
            verify_manifest(tmp_path, context, "weights")
        except CheckpointError as error:
            found.append(str(error))
    assert found and all(message in text for text in found)
    if "manifest.json" not in message and "cannot" not in message:
        assert len(found) == 1
        for context in ranks(2):
            verify_manifest(tmp_path, context, "optimizer")


def test_the_others_stop_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "any_rank", lambda flag, context: True)
    with pytest.raises(CheckpointError, match="another rank says which file"):
        verify_manifest(make(tmp_path), ranks(1)[0])


def test_older_checkpoints_have_none(tmp_path: Path) -> None:
    verify_manifest(tmp_path, ranks(1)[0])
