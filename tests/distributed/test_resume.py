"""A run that stops and goes on is the run that never stopped: bit for bit, from whichever step."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from megatron_grit.config.parse import load_config, save_config
from megatron_grit.config.schema import ParallelConfig, RunConfig
from tests.corpus import tiny_run
from tests.harness.ranks import run_on_ranks

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

STEPS = 3
MOVED_AT = 1  # a step's metrics are of the weights before it: two steps are to follow
# Number of processes and layout.
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "ep2": (2, {"expert": 2}),
    "dp2_overlap": (2, {"overlap": True}),
    "pp2_vpp2": (2, {"pipeline": 2, "virtual_pipeline": 2}),
    "tp2": (2, {"tensor": 2, "sequence_parallel": True}),
    "cp2": (2, {"context": 2}),
}


def train_and_describe(config: RunConfig) -> dict[str, Any]:
    """Train a run to its end; the records of each step, and digests of all that training changes."""
    from megatron_grit.evaluation.in_training import training_evaluator
    from megatron_grit.parallel.launch import parallel_job
    from megatron_grit.parallel.random import RandomState
    from megatron_grit.training import trainer
    from megatron_grit.training.restore_checks import optimizer_parts

    with parallel_job(config.parallel, config.training.seed) as context:
        run = trainer.Trainer(config, context, evaluator=training_evaluator(config))
        seen: dict[str, list[str]] = {}
        iterate = run.loader.iterate

        def note_and_iterate(start: int, end: int) -> Any:
            for batch in iterate(start, end):
                rows = batch.rows
                seen[str(batch.step)] = [record for row in rows for record in row.record_ids]
                yield batch

        with mock.patch.object(run.loader, "iterate", note_and_iterate):
            run.run()
        weights = hashlib.sha256()
        for chunk in run.chunks:
            for _, parameter in sorted(chunk.named_parameters()):
                weights.update(parameter.detach().numpy().tobytes())
        moments, adam_steps = hashlib.sha256(), set()
        for part in optimizer_parts(run.optimizer):
            for state in part.optimizer.state.values():
                moments.update(state["exp_avg"].numpy().tobytes() + state["exp_avg_sq"].numpy().tobytes())
                adam_steps.add(float(state["step"]))
        random = hashlib.sha256()
        for _, state in sorted(RandomState.capture().as_tensors().items()):
            random.update(state.numpy().tobytes())
        digests = {"weights": weights.hexdigest(), "moments": moments.hexdigest(), "random": random.hexdigest()}
        return {"records": seen, "digests": digests | {"adam_steps": sorted(adam_steps)}}


def go_on(config: RunConfig, name: str, source: Path, step: int) -> dict[str, Any]:
    """Train to the end in a directory of its own, from one checkpoint of another run."""
    import torch.distributed as dist

    config.output_dir = str(source.with_name(name))
    config.checkpoint.save_interval = 0  # but at the end
    if dist.get_rank() == 0:
        folder = f"checkpoints/step_{step:08d}"
        shutil.copytree(source / folder, Path(config.output_dir) / folder)
    dist.barrier()
    return train_and_describe(config) | {"metrics": metrics(config.output_dir)}


def metrics(output_dir: str) -> list[dict[str, float]]:
    lines = (Path(output_dir) / "metrics.jsonl").read_text().splitlines()
    timed = ("seconds", "tokens_per_second")
    return [{name: value for name, value in json.loads(line).items() if name not in timed} for line in lines]


def lose_random_states() -> Any:
    return mock.patch("megatron_grit.parallel.random.RandomState.restore")


def lose_adam_steps() -> Any:
    return mock.patch("megatron_grit.training.checkpoint._separate_adam_steps")


def lose_a_step_of_data() -> Any:
    """The loader begins one step later than it should."""
    from megatron_grit.data.rows.loader import GritDataLoader

    batch, fingerprint = GritDataLoader._batch, GritDataLoader.fingerprint

    def later(self: Any, step: int) -> Any:
        found = batch(self, step + 1)
        found.step = step
        return found

    return mock.patch.multiple(GritDataLoader, _batch=later, fingerprint=lambda self, step: fingerprint(self, step + 1))


# How a restore is broken, what refuses it, and in which words.
BROKEN: dict[str, tuple[Callable[[], Any], str, str]] = {
    "random": (lose_random_states, "trainer.check_random_states", "random state"),
    "adam": (lose_adam_steps, "checkpoint.check_optimizer_step", "share one step count"),
    "data": (lose_a_step_of_data, "trainer.check_next_records", "other records"),
}


def stop_everywhere(config_path: str, with_broken: bool) -> dict[str, Any]:
    """A run that saves at every step without stopping, and runs that go on from each of its checkpoints."""
    from megatron_grit.errors import CheckpointError

    config = load_config(config_path)
    whole = Path(config.output_dir)
    found: dict[str, Any] = {"whole": train_and_describe(config) | {"metrics": metrics(config.output_dir)}}
    for step in range(1, STEPS):
        found[f"from {step}"] = go_on(config, f"from{step}", whole, step)
    for name, (lose, check, _) in BROKEN.items() if with_broken else ():
        with lose():
            try:
                go_on(config, f"refused_{name}", whole, MOVED_AT)
                found[f"refused {name}"] = "went on"
            except CheckpointError as error:
                found[f"refused {name}"] = str(error)
            with mock.patch(f"megatron_grit.training.{check}"):
                found[f"broken {name}"] = go_on(config, f"broken_{name}", whole, MOVED_AT)
    return found


@pytest.fixture(scope="module", params=LAYOUTS)
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank found. Dropout makes random states matter."""
    directory = tmp_path_factory.mktemp("resume")
    num_processes, layout = LAYOUTS[request.param]
    config = tiny_run(directory, experts=4, layers=4 if "virtual_pipeline" in layout else 2)
    config.parallel = ParallelConfig(device="cpu", **layout)
    config.model.hidden_dropout = config.model.attention_dropout = 0.1
    config.training.steps, config.training.audit = STEPS, "off"
    config.checkpoint.save_interval, config.checkpoint.keep = 1, 0
    config.output_dir = str(directory / "whole")
    save_config(config, directory / "run.yaml")
    results = tmp_path_factory.mktemp("results")
    return run_on_ranks(stop_everywhere, num_processes, results, str(directory / "run.yaml"), request.param == "one")


@pytest.mark.parametrize("step", range(1, STEPS))
def test_goes_on_bit_for_bit(runs: list[dict[str, Any]], step: int) -> None:
    for rank in runs:
        whole, resumed = rank["whole"], rank[f"from {step}"]
        assert list(resumed["records"]) == [str(number) for number in range(step, STEPS)]
        assert resumed["records"] == {number: whole["records"][number] for number in resumed["records"]}
        assert resumed["metrics"] == whole["metrics"][step:] and len(resumed["metrics"]) == STEPS - step
        assert resumed["digests"] == whole["digests"]
        assert resumed["digests"]["adam_steps"] == [float(STEPS)]


def test_ranks_that_hold_the_same_weights_hold_the_same_weights(
    runs: list[dict[str, Any]], request: pytest.FixtureRequest
) -> None:
    if request.node.callspec.params["runs"] in ("dp2_overlap", "cp2"):
        assert len({rank["whole"]["digests"]["weights"] for rank in runs}) == 1


@pytest.mark.parametrize("runs", ["one"], indirect=True)
@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_restore_is_refused_and_would_be_seen(runs: list[dict[str, Any]], name: str) -> None:
    """What is compared above differs once the refusal is taken out."""
    (rank,) = runs
    assert BROKEN[name][2] in rank[f"refused {name}"]
    whole, broken = rank["whole"], rank[f"broken {name}"]
    assert broken["digests"]["weights"] != whole["digests"]["weights"]
    assert broken["metrics"] != whole["metrics"][MOVED_AT:]
    assert (broken["records"] == {number: whole["records"][number] for number in broken["records"]}) == (name != "data")
    assert (broken["digests"]["adam_steps"] == whole["digests"]["adam_steps"]) == (name != "adam")
    if name != "data":  # other rows draw other numbers
        assert (broken["digests"]["random"] == whole["digests"]["random"]) == (name != "random")


def move_everywhere(config_path: str, names: list[str]) -> dict[str, Any]:
    """Go on from one checkpoint at several layouts; the first of them trains the checkpoint if it is not there."""
    config = load_config(config_path)
    whole, found = Path(config.output_dir), {}
    if not whole.exists():
        config.parallel = ParallelConfig(device="cpu", **LAYOUTS[names[0]][1])
        found[names[0]] = train_and_describe(config) | {"metrics": metrics(config.output_dir)}
        names = names[1:]
    for name in names:
        config.parallel = ParallelConfig(device="cpu", **LAYOUTS[name][1])
        found[name] = go_on(config, name, whole, MOVED_AT)
    return found


@pytest.fixture(scope="module")
def moved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run of two chunks on each of two stages, and others that go on from its checkpoint half way."""
    directory = tmp_path_factory.mktemp("moved")
    config = tiny_run(directory, experts=4, layers=4)
    config.training.steps, config.training.audit = STEPS, "off"
    config.checkpoint.save_interval, config.checkpoint.keep = MOVED_AT, 0
    config.output_dir = str(directory / "whole")
    save_config(config, directory / "run.yaml")
    results: dict[str, Any] = {}
    for names in (["pp2_vpp2", "tp2", "cp2", "ep2", "dp2_overlap"], ["one"]):
        num_processes = LAYOUTS[names[0]][0]
        ranks = run_on_ranks(
            move_everywhere, num_processes, tmp_path_factory.mktemp("ranks"), str(directory / "run.yaml"), names
        )
        for name in names:
            seen = {
                step: sorted({record for rank in ranks for record in rank[name]["records"][step]})
                for step in map(str, range(MOVED_AT, STEPS))
            }
            results[name] = {"records": seen, "metrics": ranks[0][name]["metrics"][MOVED_AT - STEPS :]}
    return results


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "pp2_vpp2"])
def test_goes_on_at_another_layout(moved: dict[str, Any], name: str) -> None:
    """The same records, and in fp32 the same losses but for the order of sums: seen are differences up to 1.3e-7."""
    assert moved[name]["records"] == moved["pp2_vpp2"]["records"]
    for ours, theirs in zip(moved[name]["metrics"], moved["pp2_vpp2"]["metrics"], strict=True):
        assert ours["step"] == theirs["step"]
        for key in ("loss", "loss_emb", "loss_gen", "grad_norm", "loss_balance"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-6, abs=0), key
