"""Models that a checkpoint does not fit: a line names the option that differs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_grit.config.parse import save_config
from megatron_grit.config.schema.retro import RetroConfig
from megatron_grit.errors import CheckpointError
from megatron_grit.training.checkpoint import check_same_model, check_same_reader
from tests.rows import tiny_config

RETRO = RetroConfig(num_neighbors=2, layers=[1, 3], gate=0.5)
OTHER_PARAMETERS: dict[str, dict[str, Any]] = {
    "num_neighbors": {"num_neighbors": 0},
    "layers": {"layers": [0, 3]},
    "encoder_layers": {"encoder_layers": 1},
    "encoder_conditioning": {"encoder_conditioning": "none"},
    "gate": {"gate": None},
}
SAME_PARAMETERS: list[dict[str, Any]] = [{"num_neighbors": 4}, {"gate": 0.0}, {"retrieved_chunks": 1}]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    save_config(tiny_config(retro=RETRO), tmp_path / "config.yaml")
    return tmp_path


@pytest.mark.parametrize("name", OTHER_PARAMETERS)
def test_other_parameters_are_refused(name: str, checkpoint: Path) -> None:
    config = tiny_config(retro=replace(RETRO, **OTHER_PARAMETERS[name]))
    for check, remedy in ((check_same_model, "choose another output_dir"), (check_same_reader, f"retro.{name} to")):
        with pytest.raises(CheckpointError) as caught:
            check(checkpoint, config)
        said = str(caught.value)
        assert said.startswith(f"{checkpoint}: was trained with model.retro.{name} {getattr(RETRO, name)}"), said
        assert remedy in said and "\n" not in said


@pytest.mark.parametrize("changed", SAME_PARAMETERS, ids=lambda changed: next(iter(changed)))
def test_the_same_parameters_are_taken(changed: dict[str, Any], checkpoint: Path) -> None:
    config = tiny_config(retro=replace(RETRO, **changed))
    check_same_model(checkpoint, config)
    check_same_reader(checkpoint, config)


def test_a_decoder_that_reads_none_can_be_fitted(checkpoint: Path) -> None:
    save_config(tiny_config(), checkpoint / "config.yaml")
    check_same_reader(checkpoint, tiny_config(retro=RETRO))
    with pytest.raises(CheckpointError, match=r"model.retro.num_neighbors 0, and this run has 2"):
        check_same_model(checkpoint, tiny_config(retro=RETRO))
