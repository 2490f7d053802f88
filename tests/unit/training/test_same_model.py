"""Models that a checkpoint does not fit: a line names the option that differs."""

from __future__ import annotations

import contextlib
import logging
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_grit.config.checks.checkpoint import (
    check_same_model,
    check_same_parameters,
    checkpoint_errors,
    unlike_model,
    unlike_reader,
)
from megatron_grit.config.parse import save_config
from megatron_grit.config.schema.retro import RetroConfig
from megatron_grit.errors import CheckpointError
from megatron_grit.training.checkpoint_save import CheckpointSaver
from megatron_grit.training.restore_checks import check_versions_read
from megatron_grit.training.trainer import Trainer
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
    for check, remedy in ((check_same_model, "choose another output_dir"), (check_same_parameters, f"retro.{name} to")):
        with pytest.raises(CheckpointError) as caught:
            check(checkpoint, config)
        said = str(caught.value)
        assert said.startswith(f"{checkpoint}: was trained with model.retro.{name} {getattr(RETRO, name)}"), said
        assert remedy in said and "\n" not in said and "None" not in said


def test_a_decoder_of_another_size_is_refused(tmp_path: Path) -> None:
    """Also one that reads nothing."""
    saved = tiny_config()
    save_config(saved, tmp_path / "config.yaml")
    for name in ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads"):
        before = getattr(saved.model, name)
        for retro in (RetroConfig(), RETRO):
            with pytest.raises(CheckpointError) as caught:
                check_same_parameters(tmp_path, tiny_config(retro=retro, **{name: 2 * before}))
            assert str(caught.value) == (
                f"{tmp_path}: was trained with model.{name} {before}, which makes other parameters than {2 * before}; "
                f"set model.{name} to {before}"
            )


@pytest.mark.parametrize("changed", SAME_PARAMETERS, ids=lambda changed: next(iter(changed)))
def test_the_same_parameters_are_taken(changed: dict[str, Any], checkpoint: Path) -> None:
    config = tiny_config(retro=replace(RETRO, **changed))
    check_same_model(checkpoint, config)
    check_same_parameters(checkpoint, config)


def test_a_dry_run_refuses_what_the_start_refuses(checkpoint: Path, tmp_path: Path) -> None:
    """Of the checkpoint that is resumed from, or of the one that is loaded."""
    newest = tmp_path / "run" / "checkpoints" / "step_00000002"
    newest.mkdir(parents=True)
    save_config(tiny_config(retro=RETRO), newest / "config.yaml")
    for path in (newest, checkpoint):
        (path / "state.json").write_text("{}")
    config = tiny_config(retro=replace(RETRO, gate=None))
    config.output_dir, config.checkpoint.load = str(tmp_path / "run"), str(checkpoint)
    for path, check in ((newest, check_same_model), (checkpoint, check_same_parameters)):
        with pytest.raises(CheckpointError) as caught:
            check(path, config)
        assert [str(error) for error in checkpoint_errors(config)] == [str(caught.value)]
        config.checkpoint.resume = False
    config.checkpoint.load = str(tmp_path / "of_megatron")
    assert not list(checkpoint_errors(config))
    config.checkpoint.load, config.model.retro = str(checkpoint), RETRO
    assert not list(checkpoint_errors(config))


def test_chunks_of_another_length_are_told(checkpoint: Path, tmp_path: Path) -> None:
    """They make the same parameters, so the run starts."""
    config = tiny_config(retro=replace(RETRO, chunk_length=32))
    config.output_dir, config.checkpoint.load = str(tmp_path / "run"), str(checkpoint)
    check_same_parameters(checkpoint, config)
    assert list(unlike_reader(config)) == [
        f"warning: {checkpoint} was trained with model.retro.chunk_length 64, and this run has 32, that of its database"
    ]
    for retro in (RETRO, RetroConfig()):
        config.model.retro = retro
        assert list(unlike_reader(config)) == []


def test_a_model_that_computes_otherwise_is_told(tmp_path: Path) -> None:
    """Options that change what the weights compute, and no parameters; not those that say the same, or are refused."""
    save_config(tiny_config(), tmp_path / "config.yaml")
    config = tiny_config(rotary_base=5e5, norm_epsilon=0.5, attention_scale=30.0, max_position_embeddings=1024)
    config.output_dir, config.checkpoint.load = str(tmp_path / "run"), str(tmp_path)
    check_same_parameters(tmp_path, config)
    assert list(unlike_model(config)) == [
        f"warning: {tmp_path} was trained with other options than this run has: model.max_position_embeddings 512, "
        "here 1024; model.norm_epsilon 1e-05, here 0.5; model.rotary_base 10000.0, here 500000.0; "
        "model.attention_scale 0.25, here 30.0"
    ]
    same: dict[str, Any] = {"kv_channels": 16, "attention_scale": 0.25, "max_position_embeddings": 256}
    for other in (same, {"hidden_dropout": 0.1, "num_layers": 8, "retro": RETRO}):
        config.model = tiny_config(**other).model
        assert list(unlike_model(config)) == []


def test_a_decoder_that_reads_none_can_be_fitted(checkpoint: Path) -> None:
    save_config(tiny_config(), checkpoint / "config.yaml")
    check_same_parameters(checkpoint, tiny_config(retro=RETRO))
    with pytest.raises(CheckpointError, match=r"model.retro.num_neighbors 0, and this run has 2"):
        check_same_model(checkpoint, tiny_config(retro=RETRO))


class Loader:
    """Reads one version, whose chunks and neighbors are those of an identity."""

    def __init__(self, version: int, identity: str) -> None:
        self.version, self.identity = version, identity

    def versions_read(self) -> list[dict[str, Any]]:
        return [{"first_step": 0, "version": self.version, "identity": ""}]

    def open_version(self, number: int) -> str:
        return self.identity if number == self.version else ""


@pytest.mark.parametrize(
    ("step", "loader", "said"),
    [
        (3, Loader(1, "a"), ""),
        (4, Loader(2, "b"), ""),
        (4, Loader(1, "a"), "step 5 of .* reads version 2 .*, and this run version 1; set data.retro_version to 2, or"),
        (6, Loader(3, "c"), ""),  # one that the run that saved it had not opened yet
        (3, Loader(1, "c"), "version 1 of .* has other chunks or neighbors .* data.valid, put the files of the"),
    ],
)
def test_a_database_that_changed_is_refused(step: int, loader: Any, said: str, tmp_path: Path) -> None:
    saved = [
        {"first_step": 0, "version": 1, "identity": "a"},
        {"first_step": 4, "version": 2, "identity": "b"},
        {"first_step": 6, "version": 3, "identity": ""},
    ]
    with pytest.raises(CheckpointError, match=said) if said else contextlib.nullcontext():
        check_versions_read(tmp_path, saved, loader, step)


def test_a_checkpoint_knows_the_version_that_comes_next() -> None:
    """Also where no rows were made of it yet."""

    class Opens(Loader):
        def fingerprint(self, step: int) -> str:
            self.opened = True
            return f"records of {step}"

        def versions_read(self) -> list[dict[str, Any]]:
            return [{"first_step": 0, "version": 1, "identity": "a" if hasattr(self, "opened") else ""}]

    saver: Any = SimpleNamespace(_loader=Opens(1, "a"))
    assert CheckpointSaver._next_records(saver, 4) == {
        "next_records": "records of 4",
        "versions_read": [{"first_step": 0, "version": 1, "identity": "a"}],
    }


def test_a_restart_that_does_not_resume_is_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("megatron_grit"), "propagate", True)
    run: Any = SimpleNamespace(config=tiny_config(), _load_initial_weights=lambda: False)
    run.config.checkpoint.resume = False
    for count, told in (("0", []), ("1", ["restart 1 of 3 begins at step 0, because checkpoint.resume is false"])):
        for name, value in (("RANK", "0"), ("TORCHELASTIC_RESTART_COUNT", count), ("TORCHELASTIC_MAX_RESTARTS", "3")):
            monkeypatch.setenv(name, value)
        assert Trainer._restore(run) == 0 and set(caplog.messages) == set(told)
