"""One tiny trained model for the tests of whatever uses one: training takes seconds."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The configuration of a run of two steps on one process. Tests change copies of it only."""
    from megatron_grit.training.trainer import train
    from tests.corpus import tiny_run

    config = tiny_run(tmp_path_factory.mktemp("trained"))
    config.training.steps = 2
    train(config)
    return config
