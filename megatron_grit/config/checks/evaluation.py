"""What contradicts itself in ``evaluation``, and what a run will measure, in words."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from megatron_grit.config.checks.indexed import TEXTS_MADE_BY, missing_file
from megatron_grit.config.checks.problem import Problem
from megatron_grit.config.commands import suggestion
from megatron_grit.config.schema import RunConfig
from megatron_grit.config.schema.evaluation import FIGURES, Mode, TaskSpec, is_text_file, read_task

_KEY = "evaluation"
HELD_OUT = ("valid_loss", "valid_perplexity")
"""Figures of ``data.valid``."""
_LOWER = ("loss", "perplexity", "bits_per_byte", "ter")


def evaluation_tasks(config: RunConfig) -> list[TaskSpec]:
    """What ``evaluation.tasks`` says, where it has no problems."""
    return [spec for item in config.evaluation.tasks if (spec := read_task(item)) is not None]


def lower_is_better(metric: str, mode: Mode) -> bool:
    """Whether a figure is to go down."""
    return mode == "min" or (mode == "auto" and any(word in metric.rpartition("/")[2] for word in _LOWER))


def evaluation_problems(config: RunConfig) -> Iterator[Problem]:
    """Problems that the configuration alone shows."""
    knobs, names = config.evaluation, dict[str, str]()
    for item in knobs.tasks:
        spec = read_task(item)
        if spec is None:
            yield Problem(f"{_KEY}.tasks", f"{_KEY}.tasks: {item!r} is not TASK:DATA or NAME=TASK:DATA")
        elif spec.task not in FIGURES:
            near = suggestion(spec.task, FIGURES)
            known = ", ".join(FIGURES)
            yield Problem(f"{_KEY}.tasks", f"{_KEY}.tasks: unknown task {spec.task!r}{near}; there are {known}")
        elif spec.task == "lm" and config.parallel.virtual_pipeline is not None:
            yield Problem(
                f"{_KEY}.tasks",
                f"{_KEY}.tasks: {item} does not go with parallel.virtual_pipeline, in which nothing is generated; "
                "leave one of them out",
            )
        elif spec.name in names:
            yield Problem(
                f"{_KEY}.tasks",
                f"{_KEY}.tasks: {names[spec.name]} and {item} are both named {spec.name}; name one, as in "
                f"other={spec.task}:{spec.data}",
            )
        else:
            names[spec.name] = item
    if knobs.every is not None and not knobs.tasks:
        yield Problem(f"{_KEY}.every", f"{_KEY}.every has nothing to measure; give {_KEY}.tasks")
    if len(names) == len(knobs.tasks):
        yield from _metric_problems(config)


def _metric_problems(config: RunConfig) -> Iterator[Problem]:
    known, open_ended = list(HELD_OUT) if config.data.valid else [], set[str]()
    for spec in evaluation_tasks(config):
        figures = FIGURES[spec.task]
        known += [f"{spec.name}/{figure}" for figure in figures or ()]
        open_ended |= {spec.name} if figures is None else set()
    for key, metric in chosen_metrics(config).items():
        if metric in known or metric.partition("/")[0] in open_ended:
            continue
        if metric in HELD_OUT:
            yield Problem(key, f"{key} {metric} is measured on data.valid, which is not given")
        elif not known and not open_ended:
            yield Problem(key, f"{key} {metric} is measured by nothing; give {_KEY}.tasks or data.valid")
        else:
            there = ", ".join([*known, *(f"{name}/..." for name in sorted(open_ended))])
            yield Problem(key, f"{key} {metric} is not measured{suggestion(metric, known)}; there are {there}")


def chosen_metrics(config: RunConfig) -> dict[str, str]:
    """The figures that decide, by the key that names them."""
    knobs = config.evaluation
    pairs = {"early_stopping": knobs.early_stopping.metric, "best": knobs.best.metric}
    return {f"{_KEY}.{name}.metric": metric for name, metric in pairs.items() if metric is not None}


def evaluation_file_problems(config: RunConfig) -> Iterator[Problem]:
    """Data that are not there."""
    for spec in evaluation_tasks(config):
        if spec.task == "perplexity" and not is_text_file(spec.data):
            if (problem := missing_file(spec.data, TEXTS_MADE_BY, config.data.tokenizer)) is not None:
                yield Problem(f"{_KEY}.tasks", f"{_KEY}.tasks: {problem}")
        elif FIGURES[spec.task] is not None and not Path(spec.data).exists():
            yield Problem(f"{_KEY}.tasks", f"{_KEY}.tasks: there is no file {spec.data}, the data of {spec.name}")


def evaluation_lines(config: RunConfig) -> list[str]:
    """What is measured inside a run, and what follows from it; no line where nothing is."""
    knobs, lines = config.evaluation, []
    if knobs.tasks:
        when = "at the end" if knobs.every is None else f"every {knobs.every:,} steps and at the end"
        tasks = ", ".join(f"{spec.name} ({spec.task} of {spec.data})" for spec in evaluation_tasks(config))
        lines.append(f"evaluation {when}: {tasks}")
    if (metric := knobs.best.metric) is not None:
        way = "lowest" if lower_is_better(metric, knobs.best.mode) else "highest"
        lines.append(f"the checkpoint with the {way} {metric} is kept: {Path(config.output_dir) / 'best.json'}")
    stopping = knobs.early_stopping
    if stopping.metric is not None:
        way = "lower" if lower_is_better(stopping.metric, stopping.mode) else "higher"
        lines.append(f"stops after {stopping.patience} measurements without a {way} {stopping.metric}")
    return lines
