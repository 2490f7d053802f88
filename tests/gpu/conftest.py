"""One device for all tests here: the GPU where there is one, else the CPU.

Without a GPU the same bodies run on the CPU at a tiny size, with kernels that only CUDA has replaced by what their
documentation says of them (stand_ins.py). What is left for a GPU to show is CUDA itself.

Where CUDA and the CPU would share a process, the replacements of parallel/cpu_backend.py would be in CUDA's way: on a
machine with a GPU run this folder alone, ``pytest tests/gpu``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
import torch

from megatron_grit.config.schema import ParallelConfig
from megatron_grit.parallel.context import ParallelContext
from megatron_grit.parallel.launch import parallel_job
from tests.gpu import stand_ins

HAVE_GPU = torch.cuda.is_available()


@pytest.fixture(params=["cuda", "cpu"])
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device that the test computes on."""
    if request.param == "cuda" and not HAVE_GPU:
        pytest.skip("needs a GPU")
    if request.param == "cpu" and HAVE_GPU:
        pytest.skip("this process computes on the GPU")
    backend = sys.modules.get("megatron_grit.parallel.cpu_backend")
    if request.param == "cuda" and backend is not None and backend._installed:
        pytest.skip("tests on the CPU have run in this process; run tests/gpu alone")
    return torch.device(request.param)


@pytest.fixture
def context(device: torch.device) -> Iterator[ParallelContext]:
    """A mesh of this process alone."""
    with parallel_job(ParallelConfig(device=device.type), seed=1) as context:  # type: ignore[arg-type]
        yield context


@pytest.fixture
def kernels(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fused attention kernels, or on the CPU what stands in for them."""
    if device.type == "cpu":
        stand_ins.install(monkeypatch)
