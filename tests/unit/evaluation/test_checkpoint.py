"""A checkpoint's figures, with a model whose embeddings and losses are known."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from megatron_grit.data.indexed.roles import RowKind
from megatron_grit.errors import ConfigError, DataError
from megatron_grit.evaluation.checkpoint import evaluate_checkpoint
from megatron_grit.evaluation.tasks.task import format_figures
from megatron_grit.inference.model import GritModel
from megatron_grit.store.files import write_json
from tests.unit.data import indexed_files


class KnownModel:
    """Texts are numbers; n of them are as similar as their numbers are close."""

    calls: list[tuple[str | None, int]] = []

    def encode(
        self, texts: list[str], instruction: str | None, *, side: str, max_length: int, batch_tokens: int
    ) -> np.ndarray:
        assert side == ("query" if instruction else "passage")
        self.calls.append((instruction, max_length))
        angles = np.array([float(text) for text in texts])
        return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)

    def token_losses(self, prefix: str) -> tuple[np.ndarray, np.ndarray]:
        return np.array([6.0, 30.0]), np.array([2, 10])


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "run" / "checkpoints" / "step_00000007"
    path.mkdir(parents=True)
    (path / "state.json").write_text(json.dumps({"format_version": 1, "step": 7, "world_size": 2}))
    monkeypatch.setattr(GritModel, "load", lambda path, device: KnownModel())
    indexed_files.write_chats(tmp_path / "held_out", [(3, 4)])
    monkeypatch.chdir(tmp_path)
    return tmp_path / "run"


@pytest.fixture
def task(tmp_path: Path) -> Path:
    """Twenty queries; the passage of each is nearest, but that of the last is farthest."""
    angles = np.linspace(0, 1.5, 20)
    answers = [*angles[:-1], -1.5]
    lines = [{"query": ["Find", str(q)], "pos": [["", str(p)]]} for q, p in zip(angles, answers, strict=True)]
    path = tmp_path / "task.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_figures(checkpoint: Path, task: Path, tmp_path: Path) -> None:
    output = tmp_path / "figures" / "after.json"
    figures = evaluate_checkpoint(checkpoint, output, retrieval=task, generative="held_out", max_length=33)
    assert figures == json.loads(output.read_text())
    assert (figures["step"], figures["world_size"]) == (7, 2)
    assert figures["recall_at_1"] == figures["recall_at_10"] == figures["ndcg_at_10"] == 0.95
    assert figures["chance_recall_at_10"] == 0.5 and figures["num_queries"] == 20
    assert figures["lm_loss"] == 3 and figures["num_tokens"] == 12
    low, high = figures["intervals"]["recall_at_1"]
    assert low < 0.95 <= high
    assert set(KnownModel.calls) == {("Find", 33), ("", 33)}
    assert "recall_at_10      0.950" in format_figures(figures) and "chance 0.500" in format_figures(figures)


def test_one_of_the_two(checkpoint: Path, task: Path, tmp_path: Path) -> None:
    figures = evaluate_checkpoint(checkpoint, tmp_path / "a.json", generative="held_out")
    assert set(figures["intervals"]) == {"lm_loss"} and "num_queries" not in figures
    figures = evaluate_checkpoint(checkpoint, tmp_path / "b.json", retrieval=task)
    assert set(figures["intervals"]) == {"recall_at_1", "recall_at_10", "ndcg_at_10"}


def test_texts_are_looked_at_before_the_model(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GritModel, "load", lambda path, device: pytest.fail("the model was loaded"))
    with pytest.raises(DataError, match=r"none.json: no such file; .* as megatron-grit build-sft, "):
        evaluate_checkpoint(checkpoint, tmp_path / "a.json", generative="none")
    indexed_files.write(tmp_path / "pairs", [indexed_files.pair(3, 4)], RowKind.EMBEDDING)
    with pytest.raises(DataError, match=r"pairs.json: holds embedding records; .* of megatron-grit build-sft"):
        evaluate_checkpoint(checkpoint, tmp_path / "a.json", generative="pairs")


def test_nothing_to_evaluate(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--retrieval, --generative"):
        evaluate_checkpoint(checkpoint, tmp_path / "a.json")


def test_bad_task_is_found_before_the_model_is_loaded(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="missing.jsonl"):
        evaluate_checkpoint(tmp_path / "no checkpoint", tmp_path / "a.json", retrieval=tmp_path / "missing.jsonl")


def test_a_figure_that_is_not_a_number_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert not list(tmp_path.iterdir())
