"""Where a Megatron-LM checkpoint is looked for, and what is said where there is none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_grit.errors import CheckpointError
from megatron_grit.training.megatron_checkpoint import TRACKER, MegatronNames, find_megatron_checkpoint, is_other_state


def make_iteration(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}))
    (folder / ".metadata").write_bytes(b"")
    return folder


@pytest.mark.parametrize(("said", "name"), [("100\n", "iter_0000100"), ("release", "release")])
def test_the_tracker_names_the_iteration(tmp_path: Path, said: str, name: str) -> None:
    folder = make_iteration(tmp_path / name)
    (tmp_path / TRACKER).write_text(said)
    assert find_megatron_checkpoint(tmp_path) == folder == find_megatron_checkpoint(folder)


def test_other_directories_are_not_taken_for_one(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text("{}")
    assert find_megatron_checkpoint(tmp_path) is None
    assert find_megatron_checkpoint(tmp_path / "missing") is None


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("latest", "latest_checkpointed_iteration.txt: holds 'latest'; expected an iteration's number or release"),
        ("7", "iter_0000007: is not a checkpoint of format torch_dist"),
    ],
)
def test_a_tracker_that_names_nothing(tmp_path: Path, said: str, message: str) -> None:
    (tmp_path / TRACKER).write_text(said)
    with pytest.raises(CheckpointError, match=message):
        find_megatron_checkpoint(tmp_path)


def test_a_damaged_one_is_an_error_of_ours(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="iter_0000007: cannot be read"):
        MegatronNames(make_iteration(tmp_path / "iter_0000007"))


def test_what_is_not_weights() -> None:
    for name in ("optimizer.state.exp_avg.decoder.x", "rng_state/shard_0_1", "chained_0.optimizer.x", "common_state"):
        assert is_other_state(name)
    assert not is_other_state("decoder.layers.mlp.linear_fc1.weight")
