"""What is written about a run."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from megatron_grit.errors import ConfigError
from megatron_grit.parallel.context import ParallelContext
from megatron_grit.training.callbacks import MetricsFile, TensorBoard, WeightsAndBiases, build_callbacks
from tests.rows import tiny_config

RECORD = {"step": 1, "loss": 2.5, "loss_emb": 1.0, "loss_gen": 1.5, "tokens_per_second": 10.0, "seconds": 3.0}


def record(step: int) -> dict[str, Any]:
    return RECORD | {"step": step}


def steps_in(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_metrics_of_a_resumed_run_read_as_one_run(tmp_path: Path) -> None:
    """Killed in the middle of writing step 5, resumed from step 3."""
    path = tmp_path / "metrics.jsonl"
    first = MetricsFile(path, interval=1, start_step=0)
    for step in range(1, 5):
        first.after_step(record(step))
    first.close()
    with path.open("a") as file:
        file.write('{"step": 5, "lo')
    second = MetricsFile(path, interval=1, start_step=3)
    assert steps_in(path) == [1, 2, 3]
    for step in (4, 5):
        second.after_step(record(step))
    assert steps_in(path) == [1, 2, 3, 4, 5]


def test_interval(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl", interval=2, start_step=0)
    for step in range(1, 6):
        file.after_step(record(step))
    assert steps_in(tmp_path / "metrics.jsonl") == [2, 4]


def test_a_step_that_is_not_finite_has_a_line_that_any_json_reader_takes(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl", interval=10, start_step=0)
    for step in (1, 2):
        file.after_step(record(step) | ({"loss_emb": float("nan"), "grad_norm": float("inf")} if step == 2 else {}))
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    read = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert read["step"] == 2 and read["loss_emb"] is None and read["grad_norm"] is None and read["loss"] == 2.5


def test_tensorboard(tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    board = TensorBoard(tmp_path)
    board.after_step(record(1))
    board.after_step(record(2))
    board.close()
    read = events.EventAccumulator(str(tmp_path))
    read.Reload()
    assert set(read.Tags()["scalars"]) == {
        f"train/{name}" for name in ("loss", "loss_emb", "loss_gen", "tokens_per_second")
    }
    assert [(event.step, event.value) for event in read.Scalars("train/loss")] == [(1, 2.5), (2, 2.5)]


def test_weights_and_biases(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With a module in its place that notes what it is told."""
    calls: list[tuple[str, Any]] = []
    run = types.SimpleNamespace(
        log=lambda metrics, step: calls.append(("log", (step, metrics))), finish=lambda: calls.append(("finish", None))
    )
    module = types.ModuleType("wandb")
    module.init = lambda **options: calls.append(("init", options)) or run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    config = tiny_config()
    config.output_dir, config.logging.wandb_project = str(tmp_path), "project"
    callback = WeightsAndBiases(config)
    callback.after_step(record(7))
    callback.close()
    assert [name for name, _ in calls] == ["init", "log", "finish"]
    assert calls[0][1]["project"] == "project" and calls[0][1]["config"]["model"]["num_layers"] == 4
    step, metrics = calls[1][1]
    assert step == 7 and metrics["train/loss"] == 2.5 and "train/step" not in metrics


@pytest.mark.engine
@pytest.mark.parametrize(
    ("package", "setting"), [("wandb", "wandb_project"), ("torch.utils.tensorboard", "tensorboard")]
)
def test_a_missing_package_is_named(
    monkeypatch: pytest.MonkeyPatch, context: ParallelContext, tmp_path: Path, package: str, setting: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    config = tiny_config()
    config.output_dir = str(tmp_path)
    setattr(config.logging, setting, "project" if setting == "wandb_project" else True)
    with pytest.raises(ConfigError, match=f"logging.{setting} needs the .* package: pip install"):
        build_callbacks(config, context, 0)
