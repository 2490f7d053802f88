"""One table of several models: figures of training, of evaluations inside a run, of our verbs, of lm-eval and of mteb.

Writes report.md, report.json, figures.png and, where a run is among the models, loss.png.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import cycle
from pathlib import Path
from typing import Any

from megatron_grit.config.checkpoint_folder import best_checkpoint, list_checkpoints
from megatron_grit.errors import ConfigError, DataError
from megatron_grit.evaluation.bootstrap import Interval
from megatron_grit.evaluation.in_training import FOLDER
from megatron_grit.evaluation.report import draw_curves, plot, read_metrics, write_report
from megatron_grit.evaluation.results import (
    Key,
    Result,
    in_training_results,
    json_files,
    newest_tasks,
    read_json,
    read_results,
    told_apart,
    training_results,
)
from megatron_grit.store.files import check_output, replacing, write_json

SOURCES = {
    "training": "Training, last step",
    "in training": "Inside the run, last evaluation",
    "best": "Inside the run, best checkpoint",
    "evaluate": "Evaluated",
    "lm-eval": "lm-eval",
    "mteb": "mteb",
}
"""Where figures come from, and the headings of their tables."""
SUMMARIES = ("scores.json", "summary.json")
"""What ``evaluate mteb`` and ``evaluate lm`` write beside the files of the harness."""
_EVALUATION = "eval/"
_SHOWN = 40
"""Figures that figures.png has room for."""


@dataclass(kw_only=True)
class ModelResults:
    """What is told of a model."""

    path: str
    results: list[Result] = field(default_factory=list)
    lines: list[dict[str, Any]] = field(default_factory=list)
    """Of metrics.jsonl, where it is a run."""
    command: str | None = None
    """That trained it, where its newest checkpoint tells."""


def read_model(path: str | Path) -> ModelResults:
    """Everything in an output directory of a run, a folder of results, or one file of results.

    Raises:
        DataError: it is not there, holds no figure, holds one twice, or a file cannot be read.
    """
    path = Path(path)
    model = ModelResults(path=str(path))
    if path.is_file():
        model.results = read_results(path, path.name, must=True)
        return model
    if not path.is_dir():
        raise DataError("is neither a folder nor a file of results", path=path)
    if (path / "metrics.jsonl").is_file():
        model.lines = read_metrics(path / "metrics.jsonl")
        model.results += training_results(model.lines[-1], "metrics.jsonl")
        model.results += _inside(path, model.lines)
    for checkpoint in list_checkpoints(path)[-1:]:
        model.command = read_json(checkpoint / "state.json").get("command")
    commands: dict[Path, str] = {}
    held: dict[Path, list[Result]] = {}
    for file in json_files(path):
        name = str(file.relative_to(path))
        if Path(name).parts[0] != FOLDER:
            held[file] = read_results(file, name)
        if file.name in SUMMARIES and (command := read_json(file).get("command")):
            commands[file.parent] = str(command)
    counting = newest_tasks({file: [result.task for result in results] for file, results in held.items()})
    model.results += [each for file, results in held.items() for each in results if each.task in counting[file]]
    model.results = [_with_command(path, result, commands) for result in model.results]
    if not model.results:
        raise DataError("holds no metrics.jsonl, and no results of evaluate, lm-eval or mteb", path=path)
    seen: dict[Key, str] = {}
    for result in model.results:
        if result.key in seen:
            raise DataError(
                f"has {result.metric} of {result.task} in {seen[result.key]} and in {result.file}; remove one",
                path=path,
            )
        seen[result.key] = result.file
    return model


def _with_command(path: Path, result: Result, commands: Mapping[Path, str]) -> Result:
    """A figure of a harness's file, with the command of the summary in the nearest folder above it."""
    if result.source not in ("lm-eval", "mteb"):
        return result
    above = next((folder for folder in (path / result.file).parents if folder in commands), None)
    return result if above is None else replace(result, command=commands[above])


def _inside(path: Path, lines: Sequence[Mapping[str, Any]]) -> list[Result]:
    """Figures of the last evaluation inside a run, and of that of its best checkpoint."""
    steps = [line["step"] for line in lines if any(name.startswith(_EVALUATION) for name in line)]
    chosen = {"in training": steps[-1]} if steps else {}
    best = best_checkpoint(path)
    if best is not None:
        chosen["best"] = int(read_json(best / "state.json")["step"])
    found: list[Result] = []
    for source, step in chosen.items():
        name = f"{FOLDER}/step_{step:08d}.json"
        if (path / name).is_file():
            results = in_training_results(path / name, name)
            found += [replace(result, source=source) for result in results]
    return found


def write_models_report(runs: Sequence[str | Path], output_dir: str | Path) -> str:
    """Write the report of several models.

    Args:
        runs: output directories of runs, folders of results, or files of results. A model is named by the last part of
            its path, or by all of it where two would have one name.
        output_dir: folder of the report.

    Returns:
        The tables, for a terminal.

    Raises:
        DataError: see :func:`read_model`.
        ConfigError: a model is given twice, or matplotlib is not installed.
        OutputError: the folder cannot be written.
    """
    output_dir, paths = Path(output_dir), [Path(run) for run in runs]
    for path in paths:
        if [other.resolve() for other in paths].count(path.resolve()) > 1:
            raise ConfigError(f"{path} is given twice")
    for name in ("report.md", "report.json", "figures.png", "loss.png"):
        check_output(output_dir / name, [path for path in paths if path.is_file()])
    names = [path.resolve().name for path in paths]
    models = {
        name if names.count(name) == 1 else str(path): read_model(path) for name, path in zip(names, paths, strict=True)
    }
    tables = "\n\n".join(format_models(models))
    output_dir.mkdir(parents=True, exist_ok=True)
    pictures = _plot(models, output_dir)
    with replacing(output_dir / "report.md") as file:
        file.write(_page(models, tables, pictures))
    write_json(
        output_dir / "report.json",
        {
            name: {"path": model.path, "command": model.command, "results": [asdict(each) for each in model.results]}
            for name, model in models.items()
        },
    )
    return tables


def format_models(models: Mapping[str, ModelResults]) -> list[str]:
    """A Markdown table for each source, a column a model."""
    tables = []
    by_key = {name: {result.key: result for result in model.results} for name, model in models.items()}
    for source, title in SOURCES.items():
        keys = _rows(key for found in by_key.values() for key in found if key[0] == source)
        if not keys:
            continue
        rows = [["task", "metric", *models], ["---"] * (2 + len(models))]
        steps = [next((r.step for r in model.results if r.source == source), None) for model in models.values()]
        if any(step is not None for step in steps):
            rows.append(["", "step", *("" if step is None else f"{step:,}" for step in steps)])
        for key, task in keys.items():
            rows.append([task, key[2], *(_cell(found.get(key)) for found in by_key.values())])
        tables.append("\n".join([f"## {title}", "", *(f"| {' | '.join(row)} |" for row in rows)]))
    return tables


def _rows(keys: Iterable[Key]) -> dict[Key, str]:
    """Rows of a table and the name of the task in each. Figures of one name that were measured in several ways have a
    row each, one below the other, which says in what they differ."""
    ways: dict[tuple[str, str, str], dict[Key, dict[str, Any]]] = {}
    for key in keys:
        ways.setdefault(key[:3], {})[key] = dict(key[3])
    rows: dict[Key, str] = {}
    for (_, task, _), same in ways.items():
        for key, told in zip(same, told_apart(list(same.values())), strict=True):
            rows[key] = f"{task} ({told})" if told else task
    return rows


def _cell(result: Result | None) -> str:
    if result is None:
        return ""
    if result.low is None or result.high is None:
        return f"{result.value:.4g}" if abs(result.value) >= 1000 else f"{result.value:.3f}"
    return str(Interval(value=result.value, low=result.low, high=result.high))


def _page(models: Mapping[str, ModelResults], tables: str, pictures: Sequence[str]) -> str:
    lines = [
        "# Report",
        "",
        "Brackets are 95 % intervals: bootstrap intervals over test items, and 1.96 standard errors of lm-eval's. mteb",
        "tells none.",
        "",
        tables,
        "",
        *(f"![{name}]({name})\n" for name in pictures),
        "## Commands",
        "",
    ]
    for name, model in models.items():
        lines.append(f"{name} ({model.path}):\n")
        commands: dict[str, list[str]] = {}
        for result in model.results:
            files = commands.setdefault(result.command or "", [])
            files += [result.file] * (result.file not in files)
        if model.command is not None:
            lines.append(f"- training: `{model.command}`")
        for command, files in commands.items():
            told = f"`{command}`" if command else "no command is recorded"
            if files != ["metrics.jsonl"]:
                lines.append(f"- {', '.join(files)}: {told}")
        lines.append("")
    return "\n".join(lines)


def _plot(models: Mapping[str, ModelResults], output_dir: Path) -> list[str]:
    """Draw figures from 0 to 1 with their intervals, and losses of the runs. Returns names of the files."""
    pictures = []
    runs = {name: (model.lines, "loss") for name, model in models.items() if model.lines}
    if any(line.get("loss") is not None for lines, _ in runs.values() for line in lines):
        with plot(output_dir / "loss.png", xlabel="step", ylabel="loss (nats)") as axes:
            draw_curves(axes, runs)
        pictures.append("loss.png")
    results = [each for model in models.values() for each in model.results if each.source != "training"]
    keys = dict(list(_rows(each.key for each in results if 0 <= each.value <= 1).items())[:_SHOWN])
    if keys:
        with plot(output_dir / "figures.png", xlabel="figure", ylabel="") as axes:
            _draw_figures(axes, models, keys)
        pictures.append("figures.png")
    return pictures


def _draw_figures(axes: Any, models: Mapping[str, ModelResults], keys: Mapping[Key, str]) -> None:
    from matplotlib.colors import TABLEAU_COLORS

    axes.figure.set_size_inches(8, max(4.5, 0.3 * len(keys)))
    places = {key: len(keys) - 1 - row for row, key in enumerate(keys)}
    for (number, (name, model)), color in zip(enumerate(models.items()), cycle(TABLEAU_COLORS), strict=False):
        shift = 0.15 * (number - (len(models) - 1) / 2)
        found = [result for result in model.results if result.key in places and 0 <= result.value <= 1]
        if not found:
            continue
        axes.errorbar(
            [result.value for result in found],
            [places[result.key] - shift for result in found],
            xerr=[
                [max(0.0, result.value - (result.value if result.low is None else result.low)) for result in found],
                [max(0.0, (result.value if result.high is None else result.high) - result.value) for result in found],
            ],
            fmt="o",
            color=color,
            label=name,
        )
    axes.set_yticks(list(places.values()), [f"{task} {key[2]} ({key[0]})" for key, task in keys.items()], fontsize=7)


def report(
    runs: Sequence[str],
    output_dir: str,
    before_and_after: Mapping[str, str | None],
) -> str:
    """The report of several models, or of one run from an evaluation before and one after it.

    Args:
        runs: of :func:`write_models_report`; empty for the other form.
        output_dir: folder of the report.
        before_and_after: arguments of :func:`~megatron_grit.evaluation.report.write_report`.

    Raises:
        ConfigError: neither form is given, or both.
        GritError: as these two functions.
    """
    given = {name: value for name, value in before_and_after.items() if value is not None}
    if runs and given:
        raise ConfigError(f"--{next(iter(given))} is of the report of one run; leave it out, or the models")
    if runs:
        return write_models_report(runs, output_dir)
    missing = [f"--{name}" for name in ("before", "after", "metrics", "timings") if name not in given]
    if not given:
        raise ConfigError("give the models: output directories of runs, or folders of results")
    if missing:
        raise ConfigError(f"{', '.join(missing)} must be given with --{next(iter(given))}")
    return write_report(output_dir, **given)
