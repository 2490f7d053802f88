"""Nothing here needs megatron-core's GPTModel, which is deprecated, nor HybridModel, which needs a GPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_a_run_from_training_to_serving(repository: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.e2e.without_engine_models", str(tmp_path)]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
