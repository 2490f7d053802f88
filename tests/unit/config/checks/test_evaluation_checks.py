"""What of ``evaluation`` is refused before a run starts, in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_grit.config.checks.evaluation import evaluation_lines, evaluation_problems, lower_is_better
from megatron_grit.config.checks.run import find_problems
from megatron_grit.config.schema import RunConfig
from megatron_grit.config.schema.evaluation import FIGURES, expand_task, read_task


@pytest.mark.parametrize(
    ("item", "name", "task", "data"),
    [
        ("retrieval:a/dev.jsonl", "dev", "retrieval", "a/dev.jsonl"),
        ("x.1=perplexity:a/b=c:d", "x.1", "perplexity", "a/b=c:d"),
    ],
)
def test_items(item: str, name: str, task: str, data: str) -> None:
    spec = read_task(item)
    assert spec is not None and (spec.name, spec.task, spec.data) == (name, task, data)


def test_paths_are_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HELD", "/data")
    assert expand_task("dev=retrieval:$HELD/dev.jsonl") == "dev=retrieval:/data/dev.jsonl"


@pytest.mark.parametrize(
    ("tasks", "knobs", "message"),
    [
        (["dev.jsonl"], {}, "evaluation.tasks: 'dev.jsonl' is not TASK:DATA or NAME=TASK:DATA"),
        (["retreival:dev.jsonl"], {}, "unknown task 'retreival' (did you mean retrieval?); there are retrieval"),
        (["retrieval:a/dev.jsonl", "retrieval:b/dev.jsonl"], {}, "are both named dev; name one, as in other=retrieval"),
        ([], {"every": 5}, "evaluation.every has nothing to measure; give evaluation.tasks"),
        (
            ["retrieval:dev.jsonl"],
            {"best": "dev/ndcg_10"},
            "evaluation.best.metric dev/ndcg_10 is not measured (did you mean dev/ndcg_at_10?); there are dev/ndcg_at",
        ),
        ([], {"best": "dev/ndcg_at_10"}, "evaluation.best.metric dev/ndcg_at_10 is measured by nothing; give"),
        (["retrieval:dev.jsonl"], {"stop": "valid_loss"}, "valid_loss is measured on data.valid, which is not given"),
    ],
)
def test_problems(tasks: list[str], knobs: dict[str, object], message: str) -> None:
    config = RunConfig()
    config.evaluation.tasks = tasks
    config.evaluation.every = knobs.get("every")  # type: ignore[assignment]
    config.evaluation.best.metric = knobs.get("best")  # type: ignore[assignment]
    config.evaluation.early_stopping.metric = knobs.get("stop")  # type: ignore[assignment]
    (problem,) = evaluation_problems(config)
    assert message in problem.message


def test_missing_files_and_what_is_told(tmp_path: Path) -> None:
    config = RunConfig()
    config.evaluation.tasks = [f"retrieval:{tmp_path}/dev.jsonl", f"texts=perplexity:{tmp_path}/texts"]
    config.evaluation.every, config.evaluation.best.metric = 100, "dev/ndcg_at_10"
    config.evaluation.early_stopping.metric = "texts/lm_loss"
    assert not list(evaluation_problems(config))
    messages = [problem.message for problem in find_problems(config, 1) if problem.key == "evaluation.tasks"]
    assert messages == [
        f"evaluation.tasks: there is no file {tmp_path}/dev.jsonl, the data of dev",
        f"evaluation.tasks: there is no file {tmp_path}/texts.idx; make it with megatron-grit build-sft "
        "(conversations), preprocess-data (texts) or build-grit (GRIT's records)",
    ]
    first, second, third = evaluation_lines(config)
    assert first.startswith("evaluation every 100 steps and at the end: dev (retrieval of")
    assert second == "the checkpoint with the highest dev/ndcg_at_10 is kept: runs/grit/best.json"
    assert third == "stops after 3 measurements without a lower texts/lm_loss"


def test_auto_knows_which_way_every_figure_goes() -> None:
    lower = {figure for figures in FIGURES.values() for figure in figures or () if lower_is_better(figure, "auto")}
    assert lower == {"lm_loss", "perplexity"}
    assert lower_is_better("dev/ndcg_at_10", "min") and not lower_is_better("dev/lm_loss", "max")
