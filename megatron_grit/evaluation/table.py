"""Figures of several models side by side: the mean of each group of tasks, and the mean of the groups.

A model is a folder of results: ``TASK.json`` as ``megatron-grit evaluate`` and ``evaluate qa`` write it, or a file of
lm-eval's, whose figures stand under ``results``, task by task, as ``metric,filter``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from megatron_grit.config.locate import yaml_file
from megatron_grit.errors import ConfigError, DataError
from megatron_grit.evaluation.results import conditions_of, newest_tasks, read_json, tasks_of, told_apart
from megatron_grit.store.files import write_json
from megatron_grit.store.logs import get_logger

log = get_logger(__name__)

Groups = Mapping[str, Mapping[str, tuple[str, float]]]
"""Of each group its tasks; of each task its metric, and what multiplies it."""


@dataclass(frozen=True)
class GroupTable:
    """Figures by model."""

    groups: dict[str, dict[str, float]]
    """Of each model the mean of each group: every task of a group weighs the same."""
    means: dict[str, float]
    """Of each model the mean of its groups: every group weighs the same, however many tasks it has."""
    tasks: dict[str, dict[str, float]]
    """Of each model each task's figure, times what multiplies it."""

    def lines(self, latex: bool = False) -> list[str]:
        """The table, the best of each column in bold."""
        names = [*next(iter(self.groups.values())), "mean"]
        rows = {model: [*groups.values(), self.means[model]] for model, groups in self.groups.items()}
        best = [max(values) for values in zip(*rows.values(), strict=True)]

        def cell(value: float, top: float) -> str:
            text = f"{value:.4g}" if abs(value) >= 1000 else f"{value:.3f}"
            return text if value < top else f"\\textbf{{{text}}}" if latex else f"**{text}**"

        cells = [
            [model, *(cell(value, top) for value, top in zip(values, best, strict=True))]
            for model, values in rows.items()
        ]
        if not latex:
            head = ["| model | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
            return head + [f"| {' | '.join(row)} |" for row in cells]
        body = [" & ".join([_latex(row[0]), *row[1:]]) + r" \\" for row in cells]
        head = [
            rf"\begin{{tabular}}{{l{'r' * len(names)}}}",
            " & ".join(map(_latex, ["model", *names])) + r" \\ \hline",
        ]
        return [*head, *body, r"\end{tabular}"]


def _latex(text: str) -> str:
    return "".join(f"\\{letter}" if letter in "#$%&_{}" else letter for letter in text)


def group_table(folders: Sequence[str | Path], groups_file: str | Path, output: str | Path | None = None) -> GroupTable:
    """Read the figures of models and take their means. Tasks that were not measured alike are warned of.

    Args:
        folders: of each model; the last part of the path is its name.
        groups_file: YAML: group: task: metric, where a task may also be ``{metric: NAME, scale: NUMBER}``.
        output: JSON file with groups, means and tasks of each model. None: none is written.

    Raises:
        ConfigError: the file of groups is not of this form, or two folders have one name.
        DataError: a folder, a task or a figure that is not there, twice there but for lm-eval's files in one folder, or
            not a number.
    """
    groups, paths = read_groups(groups_file), [Path(folder) for folder in folders]
    names = [path.resolve().name for path in paths]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ConfigError(f"two folders are named {twice}, and a model has its name of its folder; rename one")
    tasks, measured = dict[str, dict[str, float]](), dict[str, dict[str, dict[str, Any]]]()
    for name, path in zip(names, paths, strict=True):
        tasks[name], measured[name] = _figures(path, groups)
    for task in next(iter(measured.values()), {}):
        told = told_apart([found[task] for found in measured.values()])
        if any(told):
            ways = "; ".join(f"{name}: {way or 'not told'}" for name, way in zip(names, told, strict=True))
            log.warning(f"{task} was not measured alike ({ways})")
    means = {
        model: {group: fmean(found[task] for task in of_group) for group, of_group in groups.items()}
        for model, found in tasks.items()
    }
    table = GroupTable(means, {model: fmean(each.values()) for model, each in means.items()}, tasks)
    if output is not None:
        write_json(output, {"groups": table.groups, "means": table.means, "tasks": table.tasks})
    return table


def read_groups(path: str | Path) -> Groups:
    """The groups of a YAML file.

    Raises:
        ConfigError: there is no such file, it is not of the form, or names a task twice.
    """
    with yaml_file(path, "file of groups") as (loader, root):
        value = None if root is None else loader.construct_document(root)
    groups, seen = dict[str, dict[str, tuple[str, float]]](), set[str]()
    form = f"{path}: give groups as GROUP: {{TASK: METRIC}}, or {{metric: METRIC, scale: NUMBER}} for a task"
    if not isinstance(value, dict) or not value:
        raise ConfigError(form)
    for group, tasks in value.items():
        if not isinstance(tasks, dict) or not tasks:
            raise ConfigError(f"{form}; group {group} has none")
        groups[str(group)] = {}
        for task, wanted in tasks.items():
            if task in seen:
                raise ConfigError(f"{path}: task {task} is in two groups")
            seen.add(task)
            metric, scale = (wanted.get("metric"), wanted.get("scale", 1)) if isinstance(wanted, dict) else (wanted, 1)
            if not isinstance(metric, str) or isinstance(scale, bool) or not isinstance(scale, int | float):
                raise ConfigError(f"{form}; task {task} has {wanted!r}")
            groups[str(group)][str(task)] = metric, float(scale)
    return groups


def _figures(folder: Path, groups: Groups) -> tuple[dict[str, float], dict[str, dict[str, Any]]]:
    """Of each task of the groups the figure, and how it was measured."""
    if not folder.is_dir():
        raise DataError("is no folder of results", path=folder)
    files = {path: read_json(path) for path in sorted(folder.rglob("*.json"))}
    held = {path: tasks_of(path, value) for path, value in files.items()}
    counting = newest_tasks(held)
    held = {path: {task: tasks[task] for task in tasks if task in counting[path]} for path, tasks in held.items()}
    wanted = {task: how for tasks in groups.values() for task, how in tasks.items()}
    figures, measured = dict[str, float](), dict[str, dict[str, Any]]()
    for task, (metric, scale) in wanted.items():
        path, figure = _figure(folder, held, task, metric)
        figures[task], measured[task] = scale * figure, conditions_of(files[path], task, metric.partition(",")[0])
    return figures, measured


def _figure(folder: Path, held: Mapping[Path, Mapping[str, Any]], task: str, metric: str) -> tuple[Path, float]:
    """A task's file and figure, from its own file or from one of lm-eval's."""
    found: dict[Path, Any] = {}
    for path, tasks in held.items():
        if (figures := tasks.get(task)) is not None:
            # lm-eval names a figure with the filter that it took: "acc,none".
            named = [name for name in figures if metric in (name, name.partition(",")[0])]
            if len(named) > 1:
                raise DataError(f"task {task} has {', '.join(named)}; give one of them whole", path=path)
            if named:
                found[path] = figures[named[0]]
    if not found:
        raise DataError(
            f"has no {metric} of task {task}: no {task}.json, and no file of lm-eval's with {task}", path=folder
        )
    if len(found) > 1:
        where = " and ".join(str(path.relative_to(folder)) for path in found)
        raise DataError(f"{metric} of task {task} is in {where}; remove one", path=folder)
    ((path, value),) = found.items()
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise DataError(f"{metric} of task {task} is {value!r} and no number", path=path)
    return path, float(value)
