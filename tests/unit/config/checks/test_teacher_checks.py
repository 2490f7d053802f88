"""What a configuration of a teacher may not say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_grit.config.checks.teacher import teacher_file_problems, teacher_problems
from megatron_grit.config.schema import RunConfig
from megatron_grit.config.schema.teacher import TeacherConfig
from tests.rows import tiny_config


def taught(**knobs: Any) -> RunConfig:
    config = tiny_config()
    config.loss.teacher = TeacherConfig(**knobs)
    return config


def words_of(config: RunConfig) -> str:
    return " ".join(f"{problem.key}: {problem.message}" for problem in teacher_problems(config))


@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"kind": "full", "model": "m", "direction": "reverse", "temperature": 2.0, "label_weight": 0.0},
        {"kind": "topk", "cache": "c", "direction": "reverse", "weight": 0.5},
        {"kind": "gold", "model": "m", "weight": 0.1},
    ],
)
def test_what_a_teacher_may_say(knobs: dict[str, Any]) -> None:
    assert not words_of(taught(**knobs))


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"model": "m"}, "loss.teacher.model has no effect with loss.teacher.kind none"),
        ({"kind": "gold", "model": "m", "temperature": 2.0}, "loss.teacher.temperature has no effect"),
        ({"kind": "full", "model": "m", "cache": "c"}, "loss.teacher.cache has no effect"),
        ({"kind": "topk", "cache": "c", "model": "m"}, "loss.teacher.model has no effect"),
        ({"kind": "topk"}, "needs loss.teacher.cache"),
        ({"kind": "full", "model": "m", "weight": 0.0}, "leaves the teacher out"),
        ({"kind": "full"}, "adapter.kind is none"),
        ({"kind": "gold"}, "adapter.kind is none"),
    ],
)
def test_contradictions(knobs: dict[str, Any], words: str) -> None:
    assert words in words_of(taught(**knobs))


def test_contradictions_with_the_rest_of_the_run() -> None:
    config = taught(kind="full", model="m")
    config.training.objective = "embedding"
    assert "training.objective embedding does not train" in words_of(config)
    config = taught(kind="full", model="m")
    config.model.retro.num_neighbors = 2
    assert "does not go with model.retro" in words_of(config)
    config = taught(kind="full")
    config.adapter.kind = "lora"
    assert not words_of(config), "the base is the teacher"
    config.model.retro.num_neighbors = 2
    assert not words_of(config), "and reads what they read"
    config.training.trainable = ["norms"]
    assert "changes the base" in words_of(config)
    config = taught(kind="topk", cache="c")
    config.data.over_long = "split"
    assert "data.over_long split does not go with" in words_of(config)


def test_what_is_not_there(tmp_path: Path) -> None:
    for kind, key in (("full", "model"), ("gold", "model"), ("topk", "cache")):
        there, missing = (
            list(teacher_file_problems(taught(kind=kind, **{key: str(path)}))) for path in (tmp_path, tmp_path / "no")
        )
        assert not there
        assert [problem.key for problem in missing] == [f"loss.teacher.{key}"]
