"""A run that reads neighbors: it resumes at other layouts, and takes newer versions of its database at one step on all
ranks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from megatron_grit.config.database.run import resolve_retro_project
from megatron_grit.config.parse import load_config, save_config
from megatron_grit.config.schema import ParallelConfig, RunConfig
from megatron_grit.config.schema.retro import RetroConfig
from tests.distributed.test_resume import metrics, train_and_describe
from tests.harness.ranks import run_on_ranks
from tests.rows import tiny_config
from tests.unit.retrieval.databases import WordEmbedder, database_of, make_texts

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

STEPS, AHEAD = 6, 1
SEEN_AFTER = 1
"""Steps after which version 2 is there."""
CHANGES_AT = SEEN_AFTER + AHEAD + 1


def make_run(directory: Path) -> RunConfig:
    """A database of two versions, the second of which is still hidden, and a run that reads the newest."""
    from megatron_grit.retrieval.stages.query_neighbors import query_neighbors
    from megatron_grit.retrieval.stages.tombstone import remove_documents
    from megatron_grit.retrieval.work import Worker

    project = database_of(directory, {"a": make_texts(30)}, {"held": make_texts(4, seed=3)})
    remove_documents(project, Worker(), ",".join(f"a:{number}" for number in range(0, 30, 2)))
    query_neighbors(project, Worker(), WordEmbedder())
    versions = project.folder / "db" / "versions"
    (versions / "0002.json").rename(versions / "0002.hidden")
    config = tiny_config(num_layers=2)
    config.model.hidden_dropout = config.model.attention_dropout = 0.0
    config.model.retro = RetroConfig(num_neighbors=2, layers=[0, 1])
    config.data.retro_project, config.data.retro_version = str(project.folder), "newest"
    config.data.generative = project.config.data_paths
    config.data.over_long, config.data.tokens_per_row, config.data.num_rows_multiple = "split", 64, 2
    config.data.prefetch_steps = AHEAD
    config.training.objective, config.training.generative_batch_size = "generative", 6
    config.training.steps, config.training.audit = STEPS, "off"
    config.optimizer.schedule = "constant"  # which a run that ends earlier has as well
    config.checkpoint.save_interval, config.checkpoint.keep = 2, 0
    config.logging.progress = False
    return resolve_retro_project(config, {})


def show(versions: Path) -> None:
    (versions / "0002.hidden").rename(versions / "0002.json")


def train_here(config: RunConfig, name: str, source: tuple[Path, int] | None = None) -> dict[str, Any]:
    """Train from the start, where version 2 comes on the way, or from a checkpoint of another run."""
    import torch.distributed as dist

    from megatron_grit.data.rows.version_follower import VersionFollower

    config.output_dir = str(Path(config.output_dir).with_name(name))
    if source is not None and dist.get_rank() == 0:
        folder = f"checkpoints/step_{source[1]:08d}"
        shutil.copytree(source[0] / folder, Path(config.output_dir) / folder)
    dist.barrier()
    newest, take = VersionFollower.newest, VersionFollower.take
    versions = Path(config.data.retro_project or "") / "db" / "versions"
    reads: dict[str, list[dict[str, Any]]] = {}
    asked: list[VersionFollower] = []

    def appear(self: VersionFollower) -> int:
        asked.append(self)
        if len(asked) == SEEN_AFTER and source is None and self._context.rank == 0:
            show(versions)
            self.look()
        return newest(self)

    def note(self: VersionFollower, number: int, num_trained: int) -> None:
        take(self, number, num_trained)
        reads["versions"] = self._loader.versions_read()

    with (
        mock.patch("megatron_grit.data.rows.version_follower.SECONDS", 1e6),
        mock.patch.object(VersionFollower, "newest", appear),
        mock.patch.object(VersionFollower, "take", note),
    ):
        found = train_and_describe(config)
    return found | reads | {"metrics": metrics(config.output_dir)}


def train_on_one(config_path: str) -> dict[str, Any]:
    found = train_here(load_config(config_path), "one")
    return found | {"measured": measure_alone(load_config(config_path))}


def measure_alone(config: RunConfig) -> dict[str, Any]:
    """The last checkpoint of the run, without its optimizer, on held-out texts; and what is said where another version
    of the database is to be read."""
    from megatron_grit.errors import CheckpointError
    from megatron_grit.training.trainer import train

    one, folder = Path(config.output_dir).with_name("one"), f"checkpoints/step_{STEPS:08d}"
    config.output_dir = str(one.with_name("measured"))
    copied = Path(config.output_dir) / folder
    shutil.copytree(one / folder, copied)
    shutil.rmtree(copied / "optimizer")
    config.training.skip_train, config.data.valid = True, [str(one.with_name("held"))]
    train(config)
    line = json.loads((Path(config.output_dir) / "metrics.jsonl").read_text())
    config.data.retro_version = 1
    with pytest.raises(CheckpointError) as error:
        train(config)
    return {"line": line, "refused": str(error.value)}


def train_on_two(config_path: str) -> dict[str, Any]:
    """From the start with two replicas; from the run of one process to tensor and on to pipeline parallelism; and again
    from a checkpoint of a step before the version that it says comes next."""
    config, found = load_config(config_path), {}
    versions = Path(config.data.retro_project or "") / "db" / "versions"
    one = Path(config.output_dir).with_name("one")
    config.parallel, config.training.steps = ParallelConfig(device="cpu", tensor=2, sequence_parallel=True), 4
    found["tp2"] = train_here(config, "tp2", (one, 2))
    config.parallel, config.training.steps = ParallelConfig(device="cpu", pipeline=2), STEPS
    found["pp2"] = train_here(config, "pp2", (one.with_name("tp2"), 4))
    import torch.distributed as dist

    if dist.get_rank() == 0:
        (versions / "0002.json").rename(versions / "0002.hidden")
    dist.barrier()
    config.parallel = ParallelConfig(device="cpu")
    found["dp2"] = train_here(config, "dp2")
    found["dp2 again"] = train_here(config, "dp2_again", (one.with_name("dp2"), 2))
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank of the runs of two found, and the run of one as "one"."""
    pytest.importorskip("faiss")
    directory = tmp_path_factory.mktemp("retro")
    config = make_run(directory)
    config.parallel = ParallelConfig(device="cpu")
    config.output_dir = str(directory / "run")
    save_config(config, directory / "run.yaml")
    (one,) = run_on_ranks(train_on_one, 1, tmp_path_factory.mktemp("one"), str(directory / "run.yaml"))
    ranks = run_on_ranks(train_on_two, 2, tmp_path_factory.mktemp("two"), str(directory / "run.yaml"))
    state = json.loads((directory / "one" / "checkpoints" / "step_00000002" / "state.json").read_text())
    return [rank | {"one": one, "state": state} for rank in ranks]


def test_a_newer_version_is_taken_at_one_step(runs: list[dict[str, Any]]) -> None:
    for rank in runs:
        for name in ("one", "dp2", "dp2 again", "tp2", "pp2"):
            told = [(each["first_step"], each["version"]) for each in rank[name]["versions"]]
            assert told == [(0, 1), (CHANGES_AT, 2)], name
        first, second = rank["one"]["versions"]
        assert first["identity"] != second["identity"] != ""
        # A checkpoint of a step before the change has it as well.
        assert rank["state"]["versions_read"] == rank["one"]["versions"]
    losses = [step["loss_gen"] for step in runs[0]["one"]["metrics"]]
    assert len(set(losses)) == STEPS


def test_a_checkpoint_is_measured_with_the_version_that_it_read(runs: list[dict[str, Any]]) -> None:
    measured = runs[0]["one"]["measured"]
    assert measured["line"]["step"] == STEPS and measured["line"]["valid_loss"] > 0
    assert "step 6 of the run that saved it reads version 2" in measured["refused"]
    assert "set data.retro_version to 2" in measured["refused"]


def test_a_run_resumes_with_the_versions_that_it_read(runs: list[dict[str, Any]]) -> None:
    """Bit for bit, at the same layout."""
    for rank in runs:
        assert rank["dp2 again"]["digests"] == rank["dp2"]["digests"]
        assert rank["dp2 again"]["metrics"] == rank["dp2"]["metrics"][2:]


@pytest.mark.parametrize(("name", "first", "last"), [("dp2", 0, STEPS), ("tp2", 2, 4), ("pp2", 4, STEPS)])
def test_other_layouts_train_the_same(runs: list[dict[str, Any]], name: str, first: int, last: int) -> None:
    theirs = runs[0]["one"]["metrics"][first:last]
    assert [step["step"] for step in runs[0][name]["metrics"]] == list(range(first + 1, last + 1))
    for ours, expected in zip(runs[0][name]["metrics"], theirs, strict=True):
        for key in ("loss", "loss_gen", "grad_norm"):
            assert ours[key] == pytest.approx(expected[key], rel=2e-6, abs=0), (ours["step"], key)
