"""Launchers of preferences: dry runs, a missing path, and the same in miniature."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tests.e2e.test_launchers import launch

PATHS = {"MODEL": "llama", "PREFERENCE_DATA": "a b"}
NAMES = {"train_dpo.sh": "dpo_norm", "train_kto.sh": "kto"}


@pytest.mark.parametrize("name", NAMES)
def test_dry_run(name: str, repository: Path, tmp_path: Path) -> None:
    result = launch(repository, tmp_path, name, "--training.seed", "7", DRY_RUN="1", **PATHS)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("# 8 processes = tensor 2 x pipeline 1 x data 4")
    resolved = yaml.safe_load(result.stdout)
    assert resolved["preference"]["loss"] == NAMES[name] and resolved["preference"]["data"] == ["a", "b"]
    assert (resolved["training"]["seed"], resolved["training"]["objective"]) == (7, "preference")
    assert list(tmp_path.iterdir()) == []


def test_dry_run_of_a_reward_model(repository: Path, tmp_path: Path) -> None:
    result = launch(repository, tmp_path, "train_reward.sh", "--reward.margin", "0.5", DRY_RUN="1", **PATHS)
    assert result.returncode == 0, result.stderr
    resolved = yaml.safe_load(result.stdout)
    assert resolved["training"]["objective"] == "reward" and resolved["reward"]["data"] == ["a", "b"]
    assert (resolved["reward"]["margin"], resolved["embedding"]["projection_dim"]) == (0.5, 1)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_path_is_named(repository: Path, tmp_path: Path) -> None:
    result = launch(repository, tmp_path, "train_dpo.sh", MODEL="llama")
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("train_dpo.sh: error: set PREFERENCE_DATA to ")


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.processes(2)
@pytest.mark.parametrize("name", [*NAMES, "train_reward.sh"])
def test_in_miniature(name: str, repository: Path, tmp_path: Path) -> None:
    result = launch(repository, tmp_path, name, SCALE="tiny", OUTPUT_DIR=str(tmp_path / "run"))
    assert result.returncode == 0, result.stdout + result.stderr
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    loss = "loss_preference" if name in NAMES else "loss_reward"
    assert records[-1][loss] < records[0][loss]
    assert name != "train_kto.sh" or "kl" in records[0]
