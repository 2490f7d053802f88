"""A tiny model to serve."""

from __future__ import annotations

import pytest

from megatron_grit.config.schema import RunConfig
from megatron_grit.inference.model import GritModel


@pytest.fixture(scope="module")
def model(trained_run: RunConfig) -> GritModel:
    return GritModel.load(trained_run.output_dir, device="cpu")
