"""Evaluations inside a run: the figures of the checkpoint of the step, on any mesh, and training does not notice."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from megatron_grit.config.checkpoint_folder import list_checkpoints, resolve_checkpoint
from megatron_grit.config.parse import load_config, save_config
from megatron_grit.config.schema import ParallelConfig, RunConfig
from tests.corpus import sentences, tiny_run, write_jsonl
from tests.distributed.test_resume import metrics, train_and_describe
from tests.harness.ranks import run_on_ranks

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

LAYOUTS: dict[str, dict[str, Any]] = {
    "dp2_overlap": {"overlap": True},
    "pp2_vpp2": {"pipeline": 2, "virtual_pipeline": 2},
    "tp2": {"tensor": 2, "sequence_parallel": True},
}
STEPS, EVERY = 2, 1


def with_evaluation(config: RunConfig) -> RunConfig:
    folder = Path(config.data.tokenizer or "").parent
    config = copy.deepcopy(config)
    config.evaluation.every = EVERY
    tasks = [f"retrieval:{folder}/heldout.jsonl", f"sts:{folder}/alike.jsonl", f"texts=perplexity:{folder}/gen"]
    config.evaluation.tasks = tasks
    config.evaluation.batch_tokens = 128  # several rows on each rank
    return config


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run whose dropout makes random states matter."""
    folder = tmp_path_factory.mktemp("evaluated")
    config = tiny_run(folder, experts=4, layers=4)
    pairs = sentences(24, seed=9)
    write_jsonl(folder / "heldout.jsonl", [{"query": ["Answer", q], "pos": [["", a]]} for q, a in pairs])
    alike = [{"sentence1": q, "sentence2": pairs[i // 2][1], "score": i % 5} for i, (q, _) in enumerate(pairs)]
    write_jsonl(folder / "alike.jsonl", alike)  # type: ignore[arg-type]
    config.model.hidden_dropout = config.model.attention_dropout = 0.1
    config.training.steps, config.training.audit = STEPS, "off"
    config.checkpoint.save_interval, config.checkpoint.keep = EVERY, 0
    return config


def train_both(config_path: str, folder: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for layout, mesh in LAYOUTS.items():
        config = load_config(config_path)
        config.parallel = ParallelConfig(device="cpu", **mesh)
        for name, each in {"plain": config, "evaluated": with_evaluation(config)}.items():
            each.output_dir = f"{folder}/{layout}/{name}"
            found[f"{layout} {name}"] = train_and_describe(each) | {"metrics": metrics(each.output_dir)}
    return found


@pytest.fixture(scope="module")
def found(run: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("runs")
    save_config(run, folder / "run.yaml")
    ranks = run_on_ranks(train_both, 2, tmp_path_factory.mktemp("results"), str(folder / "run.yaml"), str(folder))
    return folder, ranks


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_does_not_notice(found: tuple[Path, list[dict[str, Any]]], layout: str) -> None:
    for rank in found[1]:
        plain, evaluated = rank[f"{layout} plain"], rank[f"{layout} evaluated"]
        assert plain["digests"] == evaluated["digests"] and plain["records"] == evaluated["records"]
        without = [{key: value for key, value in line.items() if "eval" not in key} for line in evaluated["metrics"]]
        assert without == plain["metrics"]
        assert all("eval/heldout/ndcg_at_10" in line for line in evaluated["metrics"])


def furthest(line: dict[str, float], figures: dict[str, Any]) -> float:
    """Largest difference of a step's figures from those of a file of ``evaluate``."""
    named = {"heldout/ndcg_at_10", "heldout/recall_at_1", "heldout/recall_at_10", "texts/lm_loss", "texts/perplexity"}
    named |= {"alike/spearman", "alike/pearson"}
    assert {f"eval/{name}" for name in named} == {name for name in line if name.startswith("eval/")}
    return max(abs(line[f"eval/{name}"] - figures[name.partition("/")[2]]) for name in named - {"texts/perplexity"})


def test_figures_are_those_of_the_checkpoint(
    run: RunConfig, found: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    from megatron_grit.evaluation.checkpoint import evaluate_checkpoint

    folder, ranks = found
    data = Path(run.data.tokenizer or "").parent
    for layout in LAYOUTS:
        checkpoints = list_checkpoints(folder / layout / "evaluated")
        first, last = (
            evaluate_checkpoint(
                path,
                tmp_path / "out.json",
                retrieval=data / "heldout.jsonl",
                sts=data / "alike.jsonl",
                generative=str(data / "gen"),
                device="cpu",
            )
            for path in checkpoints
        )
        lines = ranks[0][f"{layout} evaluated"]["metrics"]
        assert ranks[1][f"{layout} evaluated"]["metrics"] == lines
        assert furthest(lines[0], first) < 1e-5 and furthest(lines[1], last) < 1e-5
        assert furthest(lines[0], last) > 1e-3  # another checkpoint has other figures
        written = json.loads((folder / layout / "evaluated" / "evaluations" / "step_00000002.json").read_text())
        ends = written["tasks"]["texts"]["intervals"]["lm_loss"]
        assert ends == pytest.approx(last["intervals"]["lm_loss"], abs=1e-5)


class Killed(BaseException):
    """As a signal: nothing is finished after it."""


def scripted(values: list[float], kill_at: int = 0) -> Callable[..., Any]:
    """An evaluator that finds these values, one after each step."""

    def evaluate(chunks: Any, step: int) -> dict[str, float]:
        if step == kill_at:
            raise Killed
        return {"heldout/ndcg_at_10": values[step - 1]}

    return lambda *context: evaluate


def followed(folder: Path, config: RunConfig) -> RunConfig:
    config = with_evaluation(config)
    config.training.steps, config.output_dir = 6, str(folder)
    config.evaluation.tasks = [f"heldout=retrieval:{config.data.tokenizer}"]  # which nothing reads
    config.checkpoint.asynchronous, config.checkpoint.keep = False, 1
    knobs = config.evaluation
    knobs.best.metric = knobs.early_stopping.metric = "heldout/ndcg_at_10"
    knobs.early_stopping.patience = 2
    return config


def steps_of(folder: Path) -> list[int]:
    return [int(path.name[5:]) for path in list_checkpoints(folder)]


VALUES = [0.3, 0.5, 0.4, 0.45, 0.6, 0.7]
"""The second is best until the run stops after the fourth."""


def test_a_run_stops_early_keeps_its_best_and_counts_on_after_a_kill(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    from megatron_grit.training.trainer import train

    config = tiny_run(tmp_path_factory.mktemp("small"))
    config.training.audit = "off"
    config.training.embedding_batch_size = config.training.generative_batch_size = 2
    whole = followed(tmp_path / "whole", config)
    train(whole, evaluator=scripted(VALUES))
    steps = [line["step"] for line in metrics(whole.output_dir)]
    assert steps == [1, 2, 3, 4] and steps_of(tmp_path / "whole") == [2, 4]
    record = json.loads((tmp_path / "whole" / "best.json").read_text())
    assert (record["step"], record["value"], record["mode"]) == (2, 0.5, "max")
    assert resolve_checkpoint(tmp_path / "whole" / "best").name == "step_00000002"
    assert resolve_checkpoint(tmp_path / "whole").name == "step_00000004"
    train(whole, evaluator=scripted(VALUES))  # is finished
    assert [line["step"] for line in metrics(whole.output_dir)] == steps

    killed = followed(tmp_path / "killed", config)
    killed.checkpoint.save_interval = 1
    with pytest.raises(Killed):
        train(killed, evaluator=scripted(VALUES, kill_at=4))
    assert steps_of(tmp_path / "killed") == [2, 3]
    train(killed, evaluator=scripted(VALUES))
    assert metrics(killed.output_dir) == metrics(whole.output_dir)
    assert steps_of(tmp_path / "killed") == [2, 4]
    assert json.loads((tmp_path / "killed" / "best.json").read_text()) == record

    forgetful = followed(tmp_path / "forgetful", config)  # a control: counters that start again
    forgetful.checkpoint.save_interval = 1
    with pytest.raises(Killed):
        train(forgetful, evaluator=scripted(VALUES, kill_at=4))
    with mock.patch("megatron_grit.training.validation.standings.Standings.restore"):
        train(forgetful, evaluator=scripted(VALUES))
    assert [line["step"] for line in metrics(forgetful.output_dir)] == [1, 2, 3, 4, 5, 6]
