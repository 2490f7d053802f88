"""A task of lm-eval inside a run: the figures of the checkpoint of the step, and training does not notice."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from megatron_grit.config.checkpoint_folder import list_checkpoints
from megatron_grit.config.parse import load_config, save_config
from megatron_grit.config.schema import ParallelConfig
from megatron_grit.errors import ConfigError
from tests.corpus import tiny_run
from tests.distributed.test_resume import metrics, train_and_describe
from tests.harness.ranks import run_on_ranks
from tests.unit.evaluation.lm.local_tasks import write_tasks

pytest.importorskip("lm_eval")
pytestmark = [pytest.mark.slow, pytest.mark.distributed]


def train_both(config_path: str, folder: str) -> dict[str, Any]:
    evaluated = load_config(config_path)
    plain = copy.deepcopy(evaluated)
    plain.evaluation.tasks, plain.evaluation.every = [], None
    found = {}
    for name, config in {"plain": plain, "evaluated": evaluated}.items():
        config.output_dir = f"{folder}/{name}"
        found[name] = train_and_describe(config) | {"metrics": metrics(config.output_dir)}
    return found


def test_figures_are_those_of_the_checkpoint_and_training_goes_on_as_without(tmp_path: Path) -> None:
    from megatron_grit.config.options import HarnessModel, HarnessTasks
    from megatron_grit.evaluation.in_training import training_evaluator
    from megatron_grit.evaluation.lm.run import evaluate_lm

    config = tiny_run(tmp_path)
    tasks = write_tasks(tmp_path / "tasks", count=6)
    config.model.hidden_dropout = config.model.attention_dropout = 0.1
    config.training.steps, config.training.audit = 2, "off"
    config.checkpoint.save_interval, config.checkpoint.keep = 1, 0
    config.parallel = ParallelConfig(device="cpu", tensor=2)
    knobs = config.evaluation
    knobs.every, knobs.include_path, knobs.tasks = 1, [str(tasks)], ["lm:local_text", "choice=lm:local_choice"]
    save_config(config, tmp_path / "run.yaml")
    first, second = run_on_ranks(train_both, 2, tmp_path, str(tmp_path / "run.yaml"), str(tmp_path))
    for rank in (first, second):
        assert rank["plain"]["digests"] == rank["evaluated"]["digests"]
    lines = first["evaluated"]["metrics"]

    def figures(checkpoint: Path) -> dict[str, float]:
        report = evaluate_lm(
            HarnessModel(checkpoint=str(checkpoint), device="cpu"),
            HarnessTasks(
                tasks=["local_text", "local_choice"],
                output_dir=str(tmp_path / checkpoint.name),
                include_path=[str(tasks)],
            ),
        )
        assert report is not None
        text, choice = (report.figures[""][task] for task in ("local_text", "local_choice"))
        return {
            "eval/local_text/bits_per_byte": text["bits_per_byte,none"],
            "eval/local_text/word_perplexity": text["word_perplexity,none"],
            "eval/choice/acc": choice["acc,none"],
            "eval/choice/acc_norm": choice["acc_norm,none"],
        }

    for line, checkpoint in zip(lines, list_checkpoints(tmp_path / "evaluated"), strict=True):
        expected = figures(checkpoint)
        assert {name: value for name, value in line.items() if name.startswith("eval/")} == pytest.approx(
            expected, rel=1e-5
        )
    assert abs(lines[0]["eval/local_text/bits_per_byte"] - expected["eval/local_text/bits_per_byte"]) > 1e-3

    knobs.best.metric = "choice/accuracy"
    with pytest.raises(ConfigError, match=r"choice has no figure accuracy.*it has acc, acc_norm"):
        training_evaluator(config)
    knobs.best.metric, knobs.tasks = None, ["lm:local_chioce"]
    with pytest.raises(ConfigError, match=r"local_chioce.*did you mean local_choice"):
        training_evaluator(config)
