"""A line for each record, with a model whose losses are known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_grit.cli import main as cli
from megatron_grit.inference.model import GritModel
from tests.unit.data import indexed_files


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Calls of a model whose losses are given."""
    path = tmp_path / "run" / "checkpoints" / "step_00000007"
    path.mkdir(parents=True)
    (path / "state.json").write_text(json.dumps({"format_version": 1, "step": 7, "world_size": 1}))
    calls: list[Any] = [np.array([6.0, 0.0, 30.0])]

    class KnownLosses:
        def token_losses(self, prefix: str, *, batch_tokens: int) -> tuple[np.ndarray, np.ndarray]:
            calls.append((prefix, batch_tokens))
            return calls[0], np.array([2, 0, 10])

    monkeypatch.setattr(GritModel, "load", lambda path, device: KnownLosses())
    indexed_files.write_chats(tmp_path / "chats", [(3, 4)])
    monkeypatch.chdir(tmp_path)
    return calls


COMMAND = "evaluate loss --checkpoint run --input chats --output losses.jsonl --batch-tokens 64".split()


def test_a_line_for_each_record(model: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(COMMAND) == 0
    assert model[1:] == [("chats", 64)]
    lines = [json.loads(line) for line in Path("losses.jsonl").read_text().splitlines()]
    assert lines == [
        {"record": 0, "loss_sum": 6.0, "num_tokens": 2, "loss": 3.0},
        {"record": 1, "loss_sum": 0.0, "num_tokens": 0, "loss": None},
        {"record": 2, "loss_sum": 30.0, "num_tokens": 10, "loss": 3.0},
    ]
    assert "2 records with 12 supervised tokens\nloss 3.0000 nats a token" in capsys.readouterr().out


def test_a_loss_that_is_not_finite_is_not_written(model: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    model[0] = np.array([6.0, 0.0, np.nan])
    assert cli.main(COMMAND) == 2
    assert "loss of record 2 is not finite" in capsys.readouterr().err
    assert not Path("losses.jsonl").exists()


def test_a_file_that_is_not_there_is_found_before_the_model(
    model: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*COMMAND, "--checkpoint", "none", "--input", "chat"]) == 2
    assert "error: chat.json: no such file" in capsys.readouterr().err
