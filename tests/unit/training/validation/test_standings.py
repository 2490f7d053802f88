"""Which measurement is the best, and when a run stops waiting for a better one."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from megatron_grit.config.schema.evaluation import BestConfig, EarlyStoppingConfig, EvaluationConfig
from megatron_grit.training.validation.standings import Standings


def standings(
    folder: Path, metric: str, mode: str = "auto", patience: int = 2, min_delta: float = 0.0, *, best: str | None = None
) -> Standings:
    stopping = EarlyStoppingConfig(metric=metric, mode=mode, patience=patience, min_delta=min_delta)  # type: ignore[arg-type]
    return Standings(EvaluationConfig(early_stopping=stopping, best=BestConfig(metric=best)), folder)


@pytest.mark.parametrize(
    ("metric", "mode", "min_delta", "values", "stops_at"),
    [
        ("dev/ndcg_at_10", "auto", 0.0, [0.1, 0.2, 0.2, 0.3, 0.1, 0.2], 6),  # equal is no better
        ("dev/lm_loss", "auto", 0.0, [5.0, 4.0, 4.5, 3.9, 3.9, 4.0], 6),
        ("valid_loss", "auto", 0.0, [5.0, 6.0, 5.5], 3),
        ("dev/lm_loss", "max", 0.0, [5.0, 4.0, 3.0], 3),
        ("dev/ndcg_at_10", "auto", 0.05, [0.1, 0.14, 0.16, 0.2, 0.21], 5),  # from the best, not from the last
        ("dev/lm_loss", "auto", 0.0, [5.0, math.nan, 4.0, math.nan, math.inf], 5),  # not finite is no better
        ("dev/lm_loss", "auto", 0.0, [math.nan, 5.0, 4.0, 3.0], 0),
    ],
)
def test_stops_after_the_patience(
    tmp_path: Path, metric: str, mode: str, min_delta: float, values: list[float], stops_at: int
) -> None:
    found, stopped = standings(tmp_path, metric, mode, min_delta=min_delta), []
    for step, value in enumerate(values, 1):
        found.take({"step": step, metric if metric == "valid_loss" else f"eval/{metric}": value})
        found.take({"step": step, "loss": 1.0})  # a step that is not measured counts for nothing
        stopped.append(found.stops)
    assert stopped == [bool(stops_at) and step >= stops_at for step in range(1, len(values) + 1)]


def test_state_goes_on_where_it_was_and_a_checkpoint_that_is_gone_is_forgotten(tmp_path: Path) -> None:
    first = standings(tmp_path, "dev/lm_loss", best="dev/lm_loss")
    assert first.take({"step": 2, "eval/dev/lm_loss": 3.0}) and not first.take({"step": 4, "eval/dev/lm_loss": 3.5})
    state = json.loads(json.dumps(first.state()))

    gone = standings(tmp_path, "dev/lm_loss", best="dev/lm_loss")
    gone.restore(state, is_writer=True)
    assert gone.best is not None and gone.best.value is None and not (tmp_path / "best.json").exists()
    assert gone.take({"step": 6, "eval/dev/lm_loss": 3.4}) and gone.stops  # which goes on counting

    (tmp_path / "checkpoints" / "step_00000002").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step_00000002" / "state.json").write_text("{}")
    there = standings(tmp_path, "dev/lm_loss", best="dev/lm_loss")
    there.restore(state, is_writer=True)
    assert json.loads((tmp_path / "best.json").read_text())["step"] == 2
    assert not there.take({"step": 6, "eval/dev/lm_loss": 3.4})

    other = standings(tmp_path, "dev/perplexity")
    other.restore(state, is_writer=True)  # of another figure
    assert other.stopping is not None and other.stopping.value is None
    other.restore(None, is_writer=True)
    assert not (tmp_path / "best.json").exists()
