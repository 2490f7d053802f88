"""A conversion holds less than two of the source's files, whatever the model's size; the benchmark in short."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.convert_memory import FULL, num_bytes_of, tensor_shapes


@pytest.mark.slow
def test_peak_memory(repository: Path, tmp_path: Path) -> None:
    """4 of 32 layers: 168 MB in two files. The model as a whole, or both files, would be above the bound."""
    command = [sys.executable, "benchmarks/convert_memory.py", "--layers", "4", "--directory", str(tmp_path)]
    result = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    for direction, ratio in re.findall(r"^(\w+): .* ratio (\d+\.\d+)$", result.stdout, re.MULTILINE):
        assert float(ratio) < 1, direction
    assert "import: " in result.stdout and "export: " in result.stdout
    assert not list(tmp_path.iterdir())


def test_full_size() -> None:
    """Mixtral-8x7B has 46.7 billion parameters, in tensors of at most 262 MB."""
    assert num_bytes_of(FULL) == 93_405_585_408
    largest = max(tensor_shapes(FULL), key=lambda each: each[1][0] * (each[1] + [1])[1])
    assert largest == ("model.embed_tokens.weight", [32000, 4096])
