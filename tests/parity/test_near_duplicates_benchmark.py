"""The benchmark of near duplicates in small: as much is found as bands of this kind find, and nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc for the memory of a process")
@pytest.mark.parametrize("threshold", [0.8, 0.95])
def test_as_much_is_found_as_expected(tmp_path: Path, threshold: float) -> None:
    pytest.importorskip("datasketch")
    command = [sys.executable, "-m", "benchmarks.near_duplicates", "--chunks", "6000", "--copies", "0.4"]
    options = ["--block", "2500", "--threshold", str(threshold), "--json", str(tmp_path / "result.json")]
    result = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    (found,) = json.loads((tmp_path / "result.json").read_text())
    assert found["copies"] > 100 and not found["wrong"]
    assert found["curve"] - 0.02 < found["expected"] < 1
    assert found["seconds"] > 0 and found["datasketch_seconds"] > 0


def test_the_formula_counts_what_is_drawn() -> None:
    from benchmarks.near_duplicates import share_found
    from megatron_grit.retrieval.dedup.buckets import Bands

    random, bands = np.random.default_rng(0), Bands(3, 4)
    for num_equal in (3, 6, 9, 12, 13):
        equal = np.argsort(random.random((20_000, 13)), axis=1) < num_equal
        drawn = equal[:, :12].reshape(-1, 3, 4).all(axis=2).any(axis=1).mean()
        assert share_found(bands, 13, num_equal) == pytest.approx(drawn, abs=0.015)
