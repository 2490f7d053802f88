"""What a process prints when it fails, alone and in a job."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_grit.errors import DataError, GritError, JobError
from megatron_grit.parallel import failures


@pytest.fixture
def naps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that it waits before it speaks or ends."""
    found: list[float] = []
    monkeypatch.setattr(failures.time, "sleep", found.append)
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    return found


def in_job(monkeypatch: pytest.MonkeyPatch, rank: int, world_size: int = 2) -> None:
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(world_size))


@pytest.mark.parametrize(
    ("rank", "is_first", "waits", "line"),
    [
        (0, None, False, "p: error: shard: bad\n"),
        (1, None, True, "p: error: [rank 1] shard: bad\n"),
        (1, True, False, "p: error: [rank 1] shard: bad\n"),
        (0, False, True, "p: error: shard: bad\n"),
    ],
)
def test_who_waits_with_an_error_of_the_user(
    rank: int,
    is_first: bool | None,
    waits: bool,
    line: str,
    naps: list[float],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    in_job(monkeypatch, rank)
    error: GritError = DataError("bad", path="shard")
    error.is_first = is_first
    assert failures.tell(error, "p") == 2
    assert bool(naps) == waits and capsys.readouterr().err == line


def test_a_rank_that_ends_because_of_another_says_so_and_lets_that_one_be_seen_first(
    naps: list[float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    in_job(monkeypatch, 3, 4)
    path = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
    monkeypatch.setattr(failures.time, "sleep", lambda seconds: naps.append(path.exists()))
    assert failures.tell(JobError("rank 1 ended: ValueError: x"), "p") == 1
    assert capsys.readouterr().err == "p: [rank 3] ends: rank 1 ended: ValueError: x\n"
    assert naps == [False] and path.exists()


@pytest.mark.parametrize(("world_size", "mark"), [(1, ""), (2, "[rank 0] ")])
def test_a_traceback_is_marked_with_its_rank(
    world_size: int,
    mark: str,
    naps: list[float],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    in_job(monkeypatch, 0, world_size)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    try:
        raise ValueError("a fault")
    except ValueError as error:
        assert failures.tell(error, "p") == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == f"{mark}Traceback (most recent call last):" and lines[-1] == f"{mark}ValueError: a fault"
    assert all(line.startswith(mark) for line in lines) and not naps
    told = json.loads((tmp_path / "error.json").read_text())["message"]
    assert told["message"] == "ValueError: a fault" and told["extraInfo"]["timestamp"].isdigit()
