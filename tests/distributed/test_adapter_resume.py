"""Runs that train a part of a model go on where they stood, at the same layout bit for bit and at another one."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from megatron_grit.config.schema import ParallelConfig, RunConfig
from megatron_grit.config.schema.teacher import TeacherConfig
from tests.corpus import tiny_run
from tests.distributed.test_resume import go_on, train_and_describe
from tests.harness.ranks import run_on_ranks

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

STEPS, MOVED_AT = 4, 2
SP, PP2 = {"tensor": 2, "sequence_parallel": True}, {"pipeline": 2}
# Options of the run, its layout, and the one that it goes on at.
RUNS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "lora": ({"adapter.kind": "lora"}, SP, PP2),
    "dora": ({"adapter.kind": "dora"}, PP2 | {"virtual_pipeline": 2}, SP),
    "nf4": ({"adapter.kind": "lora", "adapter.quantize": "nf4"}, SP, PP2),
    "lora of a mixture": ({"adapter.kind": "lora"}, {"expert": 2}, {"tensor": 2, "sequence_parallel": True}),
    # The first stage has nothing to train.
    "experts of a mixture": (
        {"training.trainable": ["decoder.layers.1.mlp.experts.*"]},
        {"expert": 2},
        {"tensor": 2, "sequence_parallel": True},
    ),
    # Too few parameters for both data parallel ranks.
    "final norm": ({"training.trainable": ["decoder.final_layernorm.*"]}, {}, PP2),
    "some adapters": ({"adapter.kind": "lora", "training.frozen": ["decoder.layers.[12].*"]}, SP, PP2),
    "lora kept near its base": (
        {"adapter.kind": "lora", "loss.teacher": TeacherConfig(kind="full", weight=20.0)},
        SP,
        PP2,
    ),
    # The teacher is the folder that the run starts from.
    "taught": ({"adapter.kind": "none", "loss.teacher": TeacherConfig(kind="full", model="base")}, PP2, SP),
}


def base_of(directory: Path, name: str) -> RunConfig:
    experts = 4 if "mixture" in name else None
    layers = 4 if name in ("dora", "some adapters") else 2
    config = tiny_run(directory, experts=experts, layers=layers)
    config.output_dir = str(directory / f"base of {layers} layers and {experts} experts")
    config.training.steps, config.training.audit = 1, "off"
    return config


def train_bases(directory: str) -> None:
    from megatron_grit.training.trainer import train

    for name in ("lora", "dora", "lora of a mixture"):
        train(base_of(Path(directory), name))


def train_and_go_on(directory: str, name: str) -> dict[str, Any]:
    options, layout, other = RUNS[name]
    config = base_of(Path(directory), name)
    config.checkpoint.load, config.output_dir = config.output_dir, str(Path(directory) / name)
    config.training.steps, config.checkpoint.save_interval, config.checkpoint.keep = STEPS, MOVED_AT, 0
    config.adapter.rank, config.training.audit, config.optimizer.eps = 4, "on", 1e-4
    for key, value in options.items():
        section, field = key.split(".")
        setattr(getattr(config, section), field, copy.copy(value))
    if config.loss.teacher.model is not None:
        config.loss.teacher.model, config.training.seed = config.checkpoint.load, 5
        config.checkpoint.load = None
    source = Path(config.output_dir)
    results = {}
    config.parallel = ParallelConfig(device="cpu", **layout)
    results["whole"] = train_and_describe(config)
    results["same"] = go_on(config, f"{name}-same", source, MOVED_AT)
    config.parallel = ParallelConfig(device="cpu", **other)
    results["moved"] = go_on(config, f"{name}-moved", source, MOVED_AT)
    return results


def run_all(directory: str) -> dict[str, Any]:
    return {name: train_and_go_on(directory, name) for name in RUNS}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("resume")


@pytest.fixture(scope="module")
def results(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    run_on_ranks(train_bases, 1, tmp_path_factory.mktemp("one"), str(directory))
    return run_on_ranks(run_all, 2, tmp_path_factory.mktemp("two"), str(directory))


@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_is_the_run_that_never_stopped(results: list[dict[str, Any]], name: str) -> None:
    for rank in results:
        assert rank[name]["same"]["digests"] == rank[name]["whole"]["digests"]


@pytest.mark.parametrize("name", RUNS)
def test_a_run_goes_on_at_another_layout(results: list[dict[str, Any]], directory: Path, name: str) -> None:
    """The base is recognised there: its fingerprint does not depend on the layout."""
    whole = [json.loads(line) for line in (directory / name / "metrics.jsonl").read_text().splitlines()]
    moved = results[0][name]["moved"]["metrics"]
    assert [record["step"] for record in moved] == [3, 4]
    for ours, theirs in zip(moved, whole[MOVED_AT:], strict=True):
        for key in {"loss_emb", "loss_gen", "loss_teacher", "grad_norm"} & theirs.keys():
            assert theirs[key] > 0
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-5), key
