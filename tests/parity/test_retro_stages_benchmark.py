"""The benchmark in miniature, for what it compares and counts and not for its speed."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import retro_stages

pytestmark = [pytest.mark.slow, pytest.mark.distributed]
SMALL = ["--hidden-size=64", "--length=64", "--chunk-length=16", "--rows=3", "--rounds=1", "--vocab-size=256"]


def test_benchmark(tmp_path: Path) -> None:
    """Both sides train the same, or it is an error; of a row of 64 tokens there are 256 of neighbors."""
    output = tmp_path / "retro_stages.json"
    assert retro_stages.main([*SMALL, "--json", str(output)]) == 0
    numbers = json.loads(output.read_text())
    for name, tokens in (("sent", 64 + 256), ("again", 64 + 64)):
        assert numbers[name]["sent_bytes"] == pytest.approx([3 * tokens * 64 * 4] * 2, rel=1e-3)  # and shapes
    assert 0 < numbers["problem"] < retro_stages.TOLERANCE and numbers["encoder_seconds"] > 0
    for line in numbers["gpus"]:
        assert line["saved_mb"] / line["encoder_ms"] == pytest.approx(line["equal_gbs"])


def test_sides_that_differ_are_an_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def differ(function: Any, size: int, folder: Path, arguments: argparse.Namespace) -> list[dict[str, float]]:
        return [{"problem": 0.0}, {"problem": 0.5}]

    monkeypatch.setattr(retro_stages, "run_on_ranks", differ)
    assert retro_stages.main(SMALL) == 2
    assert "the two sides differ by 0.5" in capsys.readouterr().err
