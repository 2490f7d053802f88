"""One process's mesh for the tests of a file, and with it the same weights whatever other files ran before."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from megatron_grit.config.schema import ParallelConfig
from megatron_grit.parallel.context import ParallelContext
from megatron_grit.parallel.launch import parallel_job


@pytest.fixture(scope="module")
def context() -> Iterator[ParallelContext]:
    with parallel_job(ParallelConfig(device="cpu"), seed=1) as context:
        yield context
