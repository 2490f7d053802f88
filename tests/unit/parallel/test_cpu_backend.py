"""The CPU backend answers the engine and leaves the rest of torch alone."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, so the backend stays out"),
]

PROGRAM = """
import os
import torch
from megatron_grit.config.schema import ParallelConfig
from megatron_grit.parallel import cpu_backend
from megatron_grit.parallel.launch import parallel_job
{damage}
with parallel_job(ParallelConfig(device="cpu"), seed=1) as context:
    assert torch.zeros(2, device="cuda").device.type == "cpu"
    assert "MASTER_PORT" not in os.environ and "RANK" not in os.environ
    with torch.device("meta"):
        assert torch.arange(3).device.type == "meta", "a device context has no effect"
    assert torch.arange(3).device.type == "cpu"
"""


def run(damage: str = "") -> subprocess.CompletedProcess[str]:
    """In a process of its own: what is replaced stays replaced."""
    return subprocess.run([sys.executable, "-c", PROGRAM.format(damage=damage)], capture_output=True, text=True)


def test_device_contexts_go_on_working() -> None:
    result = run()
    assert result.returncode == 0, result.stderr


def test_the_check_fails_without_the_remedy() -> None:
    result = run("cpu_backend._device_constructors = lambda: None")
    assert "a device context has no effect" in result.stderr
