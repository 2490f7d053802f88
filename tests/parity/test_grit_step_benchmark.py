"""The benchmark runs on the real texts; it fails by itself where its two sides disagree on a loss."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="the other side of the benchmark is transformers")


@pytest.mark.engine
@pytest.mark.slow
def test_benchmark(repository: Path, shared_data: Path, tmp_path: Path) -> None:
    """A sixteenth of the batch on a narrow model, for its output and not for its speed."""
    output = tmp_path / "grit_step.json"
    small = ["--scale", "16", "--steps", "1", "--hidden-size", "64", "--num-layers", "2", "--vocab-size", "1024"]
    command = [sys.executable, "-m", "benchmarks.grit_step", "--data", str(shared_data), "--json", str(output), *small]
    finished = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr
    summary = json.loads(output.read_text())
    assert (summary["queries"], summary["passages"], summary["sequences"]) == (16, 32, 2)
    assert summary["megatron_grit"]["padding_fraction"] < summary["reference"]["padding_fraction"]
    assert f"ratio {summary['ratio']:.2f}" in finished.stdout


def test_missing_data_is_one_line(repository: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.grit_step", "--data", str(tmp_path)]
    finished = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 2
    assert "grit_step: error: " in finished.stderr and "xquad_en_part1.json: missing" in finished.stderr
    assert "Traceback" not in finished.stderr
