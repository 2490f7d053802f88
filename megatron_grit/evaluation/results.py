"""Files of results, of whatever wrote them: figures by task and metric, intervals, and the commands behind them.

- ours: ``TASK.json`` of the verbs of evaluation, with the ends of intervals under ``intervals``;
- lm-eval's: figures under ``results``, task by task, as ``metric,filter``, with ``metric_stderr,filter``;
- mteb's: figures under ``scores``, split by split.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_grit.config.checks.evaluation import HELD_OUT
from megatron_grit.errors import DataError

_OTHERS = ("perplexity", "bleu", "rouge_geometric_mean")
"""Figures of ours that have no interval."""
_NORMAL_95 = 1.959964
"""Standard errors from a mean to the end of its 95 % interval, as lm-eval's own tables take it."""
_CONDITIONS = ("layer", "scorer", "num_contexts")
"""What files of ours say of how they were measured, besides on how much."""
_COUNTS = {
    "ranking": ("num_queries", "num_passages"),
    "similarity": ("num_pairs",),
    "loss": ("num_records",),
    "": ("num_pairs", "num_items", "num_questions", "num_records"),
}
"""What they say of how much, by the sort of figure: a file of ``evaluate`` may hold figures of several tasks."""
_LEFT_OUT = ("checkpoints", "cache")
"""Folders of a run that hold no results."""
_NO_FIGURES = ("step", "seconds", "lr", "tokens", "tokens_per_second", "padding_fraction", "grad_norm", "skipped_steps")
"""Metrics of a step that say nothing of a model."""


Key = tuple[str, str, str, tuple[tuple[str, Any], ...]]
"""Source, task, metric, and how it was measured."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """One figure of a model."""

    source: str
    """training, in training, evaluate, lm-eval or mteb."""
    task: str
    metric: str
    value: float
    low: float | None = None
    """Ends of its 95 % interval. None: it has none."""
    high: float | None = None
    file: str
    """It stands in."""
    step: int | None = None
    """Trained steps, where the file tells."""
    command: str | None = None
    """What made it, where the file tells."""
    measured: dict[str, Any] = field(default_factory=dict)
    """How and on how much, where the file tells: figures that differ here are not of one row."""

    @property
    def key(self) -> Key:
        """What models have in common."""
        return self.source, self.task, self.metric, tuple(self.measured.items())


def read_json(path: Path) -> dict[str, Any]:
    """An object of a file; empty where it holds something else.

    Raises:
        DataError: it cannot be read.
    """
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"cannot be read as JSON ({error})", path=path) from None
    return value if isinstance(value, dict) else {}


def json_files(folder: Path) -> list[Path]:
    """The JSON files of a folder of results, which may be that of a run."""
    found = sorted(folder.rglob("*.json"))
    return [path for path in found if not set(path.relative_to(folder).parts[:-1]) & {*_LEFT_OUT}]


def tasks_of(path: Path, value: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Of each task of a file what it says by name; a file of ours is one task, named as the file. mteb's tasks are in
    the scores.json of ``evaluate mteb``, in lm-eval's form."""
    if isinstance(results := value.get("results"), dict):
        return {task: figures for task, figures in results.items() if isinstance(figures, dict)}
    return {path.stem: value}


def newest_tasks(tasks: Mapping[Path, Iterable[str]]) -> dict[Path, set[str]]:
    """Of each file the tasks that count. lm-eval adds a ``results_TIME.json`` to a folder each time it is run there: of
    those that have a task the newest counts, by the time in its name. In all other files every task counts."""
    newest = {(path.parent, task): path for path in sorted(tasks) if _is_dated(path) for task in tasks[path]}
    return {
        path: {task for task in own if not _is_dated(path) or newest[path.parent, task] == path}
        for path, own in tasks.items()
    }


def _is_dated(path: Path) -> bool:
    return path.name.startswith("results_")


def is_mteb(value: Mapping[str, Any]) -> bool:
    """Whether a file is a result of mteb's."""
    return isinstance(value.get("scores"), dict) and "task_name" in value


def _mteb_figures(value: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The main score of each split and subset: "main_score" where there is one."""
    rows = [(split, row) for split, rows in value["scores"].items() for row in rows if isinstance(row, dict)]
    for split, row in rows:
        subset = row.get("hf_subset", "default")
        where = [split] * (len(value["scores"]) > 1) + [subset] * (subset != "default" or len(rows) > 1)
        yield ",".join(["main_score", *where]), row.get("main_score")


def read_results(path: Path, name: str, *, must: bool = False) -> list[Result]:
    """The figures of a file; none where it is no file of results.

    Args:
        path: of the file.
        name: how its folder calls it.
        must: refuse a file that has none.

    Raises:
        DataError: it cannot be read, or has no figure.
    """
    value = read_json(path)
    if isinstance(value.get("results"), dict):
        found = list(_of_lm_eval(value, name))
    elif is_mteb(value):
        found = list(_of_mteb(value, name))
    else:
        found = _of_ours(value, "evaluate", path.stem.removesuffix(".summary"), name)
    if must and not found:
        raise DataError("holds no figures of evaluate, lm-eval or mteb", path=path)
    return found


def _of_ours(value: Mapping[str, Any], source: str, task: str, name: str) -> list[Result]:
    ends = value.get("intervals")
    if not isinstance(ends, dict):
        return []
    found, step = [], value.get("step")
    others = [name for name in (*_OTHERS, *value.get("figures", [])) if name in value and name not in ends]
    for metric in [*ends, *others]:
        if not _is_number(value.get(metric)):
            continue
        low, high = ends.get(metric, (None, None))
        found.append(
            Result(
                source=source,
                task=task,
                metric=metric,
                value=float(value[metric]),
                low=low,
                high=high,
                file=name,
                step=step if isinstance(step, int) else None,
                command=value.get("command"),
                measured=conditions_of(value, task, metric),
            )
        )
    return found


def conditions_of(value: Mapping[str, Any], task: str, metric: str) -> dict[str, Any]:
    """How, and on how much, a figure of a file of ours or of lm-eval's was measured, as far as the file tells."""
    if isinstance(value.get("results"), dict):
        return _harness_conditions(value, task)
    names = (*_CONDITIONS, *_COUNTS[_sort_of(metric)])
    return {name: value[name] for name in names if isinstance(value.get(name), str | int)}


def told_apart(ways: Sequence[Mapping[str, Any]]) -> list[str]:
    """Of ways in which a figure was measured, each one's conditions that are not those of all: ``layer 0, ...``."""
    names = dict.fromkeys(name for each in ways for name in each)
    differing = [name for name in names if len({each.get(name) for each in ways}) > 1]
    return [", ".join(f"{name} {each[name]}" for name in differing if name in each) for each in ways]


def _sort_of(metric: str) -> str:
    if "_at_" in metric:
        return "ranking"
    if metric in ("spearman", "pearson"):
        return "similarity"
    return "loss" if metric in ("lm_loss", "perplexity") else ""


def _of_lm_eval(value: Mapping[str, Any], name: str) -> Iterator[Result]:
    command = value.get("command") or _harness_command(value)
    for task, metric, figure, margin in harness_figures(value["results"]):
        yield Result(
            source="lm-eval",
            task=task,
            metric=metric,
            value=figure,
            low=None if margin is None else figure - margin,
            high=None if margin is None else figure + margin,
            file=name,
            command=command,
            measured=conditions_of(value, task, metric),
        )


def _harness_conditions(value: Mapping[str, Any], task: str) -> dict[str, Any]:
    """Version, examples in a prompt and number of documents of a task of lm-eval's, where its file tells."""
    found = {name: (value.get(name) or {}).get(task) for name in ("versions", "n-shot", "n-samples")}
    documents = found["n-samples"].get("effective") if isinstance(found["n-samples"], dict) else None
    told = {"version": found["versions"], "shots": found["n-shot"], "num_documents": documents}
    return {name: each for name, each in told.items() if isinstance(each, str | int | float)}


def harness_figures(results: Mapping[str, Any]) -> Iterator[tuple[str, str, float, float | None]]:
    """Task, metric, figure and half the width of its 95 % interval, where it has one, of lm-eval's ``results``. The
    filter "none" is left out of a metric's name."""
    for task, figures in results.items():
        for metric, figure in figures.items() if isinstance(figures, dict) else ():
            first, _, filtered = metric.partition(",")
            if not filtered or first.endswith("_stderr") or not _is_number(figure):
                continue
            error = figures.get(f"{first}_stderr,{filtered}")
            margin = _NORMAL_95 * float(error) if _is_number(error) else None
            yield task, first if filtered == "none" else metric, float(figure), margin


def _harness_command(value: Mapping[str, Any]) -> str | None:
    """As lm-eval tells what it ran: its model, arguments and tasks."""
    config = value.get("config")
    if not isinstance(config, dict) or "model" not in config:
        return None
    arguments = config.get("model_args")
    if isinstance(arguments, dict):
        arguments = ",".join(f"{key}={each}" for key, each in arguments.items())
    tasks = ",".join(map(str, value["results"]))
    return f"lm_eval --model {config['model']} --model_args {arguments} --tasks {tasks}"


def _of_mteb(value: Mapping[str, Any], name: str) -> Iterator[Result]:
    for metric, figure in _mteb_figures(value):
        if _is_number(figure):
            yield Result(
                source="mteb",
                task=str(value["task_name"]),
                metric=metric,
                value=float(figure),
                file=name,
                command=value.get("command"),
            )


def in_training_results(path: Path, name: str) -> list[Result]:
    """Figures of a file of ``output_dir/evaluations``."""
    value = read_json(path)
    found: list[Result] = []
    for task, figures in (value.get("tasks") or {}).items():
        shared = {"step": value.get("step"), "command": value.get("command")}
        found += _of_ours(dict(figures) | shared, "in training", str(task), name)
    return found


def training_results(line: Mapping[str, Any], name: str) -> list[Result]:
    """Figures of a line of metrics.jsonl: losses, accuracies, and those of held-out texts."""
    chosen = {
        key: figure
        for key, figure in line.items()
        if _is_number(figure) and key not in _NO_FIGURES and not key.startswith(("eval/", "valid_"))
    }
    chosen |= {key: line[key] for key in HELD_OUT if _is_number(line.get(key))}
    return [
        Result(source="training", task="run", metric=key, value=float(figure), file=name, step=line["step"])
        for key, figure in chosen.items()
    ]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
