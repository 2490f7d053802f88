"""A tiny model to serve."""

from __future__ import annotations

import pytest

from megatron_grit.config.schema import RunConfig
from megatron_grit.inference.model import GritModel
from megatron_grit.training.trainer import train
from tests.corpus import tiny_run


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """An untrained model on disk."""
    config = tiny_run(tmp_path_factory.mktemp("server"))
    config.training.steps = 0
    train(config)
    return config


@pytest.fixture(scope="module")
def model(config: RunConfig) -> GritModel:
    return GritModel.load(config.output_dir, device="cpu")
