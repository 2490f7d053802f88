"""A short campaign of kills: the newest checkpoint is always whole and always the right one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NUM_KILLS = 8

pytestmark = [pytest.mark.slow, pytest.mark.distributed]


def campaign(tmp_path: Path, *options: str) -> tuple[int, str, dict[str, dict[str, object]]]:
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "benchmarks.kill_campaign",
        "--torchrun",
        "0",
        "--retro",
        "0",
        *options,
    ]
    command += ["--json", str(tmp_path / "table.json")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    return result.returncode, result.stdout + result.stderr, json.loads((tmp_path / "table.json").read_text())


def test_always_a_checkpoint_and_never_a_wrong_one(tmp_path: Path) -> None:
    status, said, table = campaign(tmp_path, "--kills", str(NUM_KILLS))
    assert status == 0, said
    assert len(table) == 4 and sum(int(str(row["kills"])) for row in table.values()) == NUM_KILLS
    assert all(row["loaded"] and row["steps"] and not row["wrong"] for row in table.values()), said


def test_a_checkpoint_that_is_not_whole_is_seen(tmp_path: Path) -> None:
    """The same, where a checkpoint is copied to its name and not renamed."""
    status, said, table = campaign(tmp_path, "--kills", "8", "--break", "copy")
    assert status == 1 and any(row["wrong"] for row in table.values()), said
