"""A run that is asked to stop saves, says so, and goes on when it is started again."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest

from megatron_grit.config.parse import save_config
from tests.corpus import tiny_run
from tests.harness.command import python

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_the_same_command_goes_on(tmp_path: Path, number: signal.Signals) -> None:
    config = tiny_run(tmp_path)
    config.training.steps = 100_000
    save_config(config, tmp_path / "run.yaml")
    command = [python(), "-m", "megatron_grit.cli.train", "--config", str(tmp_path / "run.yaml")]
    metrics = tmp_path / "run" / "metrics.jsonl"
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline and (not metrics.exists() or metrics.read_text().count("\n") < 3):
        time.sleep(0.2)
    process.send_signal(number)
    _, messages = process.communicate(timeout=600)
    assert process.returncode == 128 + number, messages
    assert "resumes from there" in messages and "Traceback" not in messages
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    (saved,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert saved.name == f"step_{steps[-1]:08d}"
    again = [*command, "--training.steps", str(steps[-1] + 2)]
    subprocess.run(again, cwd=ROOT, check=True, capture_output=True, timeout=600)
    after = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert after == list(range(1, steps[-1] + 3))


def test_a_time_limit_saves_and_the_same_command_goes_on(tmp_path: Path) -> None:
    config = tiny_run(tmp_path)
    config.training.steps = 100_000
    config.training.max_minutes = 0.02
    save_config(config, tmp_path / "run.yaml")
    command = [python(), "-m", "megatron_grit.cli.train", "--config", str(tmp_path / "run.yaml")]
    metrics = tmp_path / "run" / "metrics.jsonl"
    ends = []
    for _ in range(2):
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
        assert result.returncode == 0 and "resumes from there" in result.stderr, result.stderr
        ends.append(json.loads(metrics.read_text().splitlines()[-1])["step"])
    assert 0 < ends[0] < ends[1] < 100_000
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == list(range(1, ends[1] + 1))
