"""A run that stops and goes on is the run that never stopped, bit for bit."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_grit.config.parse import load_config, save_config
from megatron_grit.config.schema import ParallelConfig
from tests.corpus import tiny_run
from tests.distributed.harness import run_on_ranks

STOPPED_AT = 2
STEPS = 4
# Number of processes and layout.
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "ep2": (2, {"expert": 2}),
    "dp2_overlap": (2, {"overlap": True}),
    "pp2_vpp2": (2, {"pipeline": 2, "virtual_pipeline": 2}),
    "cp2": (2, {"context": 2}),
}


def train_and_describe(config_path: str, break_adam: bool = False) -> dict[str, Any]:
    """Run a configuration; return the records of each step and digests of everything that training changes."""
    from megatron_grit.parallel.launch import parallel_job
    from megatron_grit.training import checkpoint, trainer

    config = load_config(config_path)
    if break_adam:
        checkpoint._separate_adam_steps = lambda optimizer: None
    with parallel_job(config.parallel, config.training.seed) as context:
        run = trainer.Trainer(config, context)
        seen: dict[str, list[str]] = {}
        step = run.step

        def record_and_step(batch: Any) -> dict[str, float]:
            rows = batch.embedding_rows + batch.generative_rows
            seen[str(batch.step)] = [record for row in rows for record in row.record_ids]
            return step(batch)

        run.step = record_and_step  # type: ignore[assignment]
        run.run()
        weights = hashlib.sha256()
        for chunk in run.chunks:
            for _, parameter in sorted(chunk.named_parameters()):
                weights.update(parameter.detach().numpy().tobytes())
        moments, adam_steps = hashlib.sha256(), set()
        for part in checkpoint._parts(run.optimizer):
            for state in part.optimizer.state.values():
                moments.update(state["exp_avg"].numpy().tobytes() + state["exp_avg_sq"].numpy().tobytes())
                adam_steps.add(float(state["step"]))
        digests = {"weights": weights.hexdigest(), "moments": moments.hexdigest(), "adam_steps": sorted(adam_steps)}
        return {"records": seen, "digests": digests}


def metrics(output_dir: str) -> list[dict[str, float]]:
    lines = (Path(output_dir) / "metrics.jsonl").read_text().splitlines()
    timed = ("seconds", "tokens_per_second")
    return [{name: value for name, value in json.loads(line).items() if name not in timed} for line in lines]


@pytest.fixture(scope="module", params=LAYOUTS)
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One run without interruption, and one from its checkpoint half way. Dropout makes random states matter."""
    directory = tmp_path_factory.mktemp("resume")
    config = tiny_run(directory, experts=4)
    num_processes, layout = LAYOUTS[request.param]
    for name, value in layout.items():
        setattr(config.parallel, name, value)
    config.model.hidden_dropout = config.model.attention_dropout = 0.1
    config.training.steps = STEPS
    config.checkpoint.save_interval, config.checkpoint.keep = STOPPED_AT, 0
    results: dict[str, Any] = {}
    for name in ("whole", "resumed", "broken"):
        config.output_dir = str(directory / name)
        path = directory / f"{name}.yaml"
        save_config(config, path)
        if name != "whole":
            step = f"checkpoints/step_{STOPPED_AT:08d}"
            shutil.copytree(directory / "whole" / step, directory / name / step)
        ranks = run_on_ranks(
            train_and_describe, num_processes, tmp_path_factory.mktemp(name), str(path), name == "broken"
        )
        results[name] = {"ranks": ranks, "metrics": metrics(config.output_dir)}
    results["replicas"] = request.param in ("dp2_overlap", "cp2")
    return results


def test_the_same_records(runs: dict[str, Any]) -> None:
    for whole, resumed in zip(runs["whole"]["ranks"], runs["resumed"]["ranks"], strict=True):
        assert list(resumed["records"]) == [str(step) for step in range(STOPPED_AT, STEPS)]
        for step, records in resumed["records"].items():
            assert records == whole["records"][step]


def test_the_same_losses(runs: dict[str, Any]) -> None:
    assert runs["resumed"]["metrics"] == runs["whole"]["metrics"][STOPPED_AT:]
    assert len(runs["resumed"]["metrics"]) == STEPS - STOPPED_AT


def test_the_same_weights_and_optimizer(runs: dict[str, Any]) -> None:
    for whole, resumed in zip(runs["whole"]["ranks"], runs["resumed"]["ranks"], strict=True):
        assert resumed["digests"] == whole["digests"]
        assert resumed["digests"]["adam_steps"] == [float(STEPS)]
    if runs["replicas"]:
        assert len({rank["digests"]["weights"] for rank in runs["whole"]["ranks"]}) == 1, "ranks save other weights"


def test_a_broken_restore_is_seen(runs: dict[str, Any]) -> None:
    """With the engine's shared step tensor left as it is, bias correction is wrong and nothing above would hold."""
    whole, broken = runs["whole"]["ranks"][0]["digests"], runs["broken"]["ranks"][0]["digests"]
    assert broken["adam_steps"] != whole["adam_steps"]
    assert broken["weights"] != whole["weights"]


@pytest.fixture(scope="module")
def moved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run of two chunks on each of two stages, and others that go on from its checkpoint half way."""
    directory = tmp_path_factory.mktemp("moved")
    config = tiny_run(directory, experts=4)
    config.training.steps = STEPS
    config.checkpoint.save_interval, config.checkpoint.keep = STOPPED_AT, 0
    results: dict[str, Any] = {}
    for name in ("pp2_vpp2", "one", "cp2", "dp2_overlap"):
        num_processes, layout = LAYOUTS[name]
        config.parallel = ParallelConfig(device="cpu", **layout)
        config.output_dir = str(directory / name)
        path = directory / f"{name}.yaml"
        save_config(config, path)
        if name != "pp2_vpp2":
            step = f"checkpoints/step_{STOPPED_AT:08d}"
            shutil.copytree(directory / "pp2_vpp2" / step, directory / name / step)
        ranks = run_on_ranks(train_and_describe, num_processes, tmp_path_factory.mktemp(name), str(path))
        seen = {step: sorted({record for rank in ranks for record in rank["records"][step]}) for step in ("2", "3")}
        results[name] = {"records": seen, "metrics": metrics(config.output_dir)[-2:]}
    return results


@pytest.mark.parametrize("name", ["one", "cp2", "dp2_overlap"])
def test_goes_on_at_another_layout(moved: dict[str, Any], name: str) -> None:
    assert moved[name]["records"] == moved["pp2_vpp2"]["records"]
    for ours, theirs in zip(moved[name]["metrics"], moved["pp2_vpp2"]["metrics"], strict=True):
        assert ours["step"] == theirs["step"]
        for key in ("loss", "grad_norm", "loss_balance"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-5), key
