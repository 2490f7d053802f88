"""The benchmark in miniature, for its output and not for its speed; it compares cached logits with full passes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import retro_generate

SMALL = ["--num-layers=6", "--hidden-size=64", "--vocab-size=64", "--length=32", "--prompt=7", "--chunk-length=6"]


def test_benchmark(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "retro_generate.json"
    status = retro_generate.main([*SMALL, "--every=4", "--passes=5", "--rounds=1", "--json", str(output)])
    numbers = json.loads(output.read_text())
    met = numbers["over_full_at_length"] >= 25 and numbers["over_gpt"] <= 1.6
    assert status == (0 if met else 1) and numbers["over_gpt"] > 0
    assert numbers["over_full"] == pytest.approx(numbers["full_ms"] / numbers["retro_ms"])
    assert f"over_gpt {numbers['over_gpt']:9.2f}" in capsys.readouterr().out


def test_other_logits_than_those_of_full_passes_are_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    full_row = retro_generate.full_row

    def without_neighbors(*given):  # type: ignore[no-untyped-def]
        row = full_row(*given)
        row.neighbors = None
        return row

    monkeypatch.setattr(retro_generate, "full_row", without_neighbors)
    assert retro_generate.main([*SMALL, "--rounds=1"]) == 2
    assert "from those of a full pass" in capsys.readouterr().err
