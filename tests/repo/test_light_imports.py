"""What starts on login nodes, or many times over, starts without torch and the engine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

LIGHT = {
    "a configuration": ["megatron_grit.config.parse", "megatron_grit.config.checks.run", "megatron_grit.planning.plan"],
    "a worker of a build": [
        "megatron_grit.data.builders.block_build",
        "megatron_grit.data.builders.documents",
        "megatron_grit.data.builders.grit_builder",
        "megatron_grit.data.builders.record_encoder",
        "megatron_grit.data.text.tokenizer",
    ],
    "inspection": ["megatron_grit.data.indexed.merge", "megatron_grit.data.indexed.inspection"],
}
HEAVY = ("torch", "megatron.core", "transformers", "matplotlib", "nltk")


@pytest.mark.parametrize("what", LIGHT)
def test_nothing_heavy_is_imported(repository: Path, what: str) -> None:
    code = f"import sys, {', '.join(LIGHT[what])}; print([name for name in {HEAVY!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
