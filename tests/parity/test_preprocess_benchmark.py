"""The benchmark of preprocess_data.py in small: it runs, and what it compares is the same to the byte."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_outputs_are_those_of_the_classic_loop(shared_data, tmp_path):
    pytest.importorskip("transformers")
    sizes = ["--mb", "0.3", "--rounds", "1", "--workers", "1", "2", "--vocab-size", "2000"]
    command = [sys.executable, "-m", "benchmarks.preprocess", "--data", str(shared_data), *sizes]
    result = subprocess.run(
        [*command, "--json", str(tmp_path / "result.json")], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert result.returncode in (0, 1), result.stderr  # speed is for a quiet machine
    assert result.stdout.count("outputs are byte-identical") == 2
    assert result.stdout.count("x the classic loop (target 3.0)") == 4
    for corpus in json.loads((tmp_path / "result.json").read_text()).values():
        assert corpus["equal"]
        assert all(seconds > 0 for seconds in corpus["seconds"].values())


def test_outputs_that_differ_are_noticed(tmp_path):
    from benchmarks.preprocess import same_output

    for name, content in (("ours_text_document", b"a"), ("classic", b"a")):
        for extension in ("bin", "idx"):
            (tmp_path / f"{name}.{extension}").write_bytes(content)
    assert same_output(tmp_path / "ours", tmp_path / "classic")
    (tmp_path / "classic.idx").write_bytes(b"b")
    assert not same_output(tmp_path / "ours", tmp_path / "classic")
