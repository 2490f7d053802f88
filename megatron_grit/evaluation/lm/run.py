"""Evaluates a model with lm-eval's harness: suites and tasks, results in the harness's own files, resumable."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from megatron_grit.config.commands import command_line
from megatron_grit.config.options import HarnessModel, HarnessTasks
from megatron_grit.errors import ConfigError, DataError, OutputError
from megatron_grit.evaluation.lm.harness import import_lm_eval
from megatron_grit.evaluation.lm.tasks import Part, TaskLoader, parts_of
from megatron_grit.store.environment import job_rank
from megatron_grit.store.files import check_output, write_json
from megatron_grit.store.logs import get_logger, say_loading

if TYPE_CHECKING:
    from megatron_grit.evaluation.lm.adapter import MegatronGritLM

log = get_logger(__name__)

ANSWERS = "answers"
"""Folder of the answers beside the results."""
SUMMARY = "summary.json"


@dataclass(frozen=True)
class LmReport:
    """Figures of an evaluation."""

    figures: dict[str, dict[str, dict[str, float]]]
    """Of each part its tasks and groups; of each of those its metrics, as lm-eval names them."""
    parts: dict[str, float]
    """Of each part of a suite the figure that means are taken of."""
    groups: dict[str, float]
    """Mean of the parts of each group of a suite."""

    def lines(self) -> list[str]:
        """A line for each figure, then the means."""
        lines = []
        for part, tasks in self.figures.items():
            for task, metrics in tasks.items():
                name = f"{part}/{task}" if part and part != task else task
                for metric, value in metrics.items():
                    if "_stderr," in metric or not isinstance(value, int | float):
                        continue
                    error = metrics.get(metric.replace(",", "_stderr,", 1))
                    around = f" ± {error:.4f}" if isinstance(error, int | float) else ""
                    lines.append(f"{name}: {metric} {value:.4f}{around}")
        lines += [f"group {group}: {value:.4f}" for group, value in self.groups.items()]
        if len(self.groups) > 1:
            lines.append(f"mean of {len(self.groups)} groups: {fmean(self.groups.values()):.4f}")
        return lines


def evaluate_lm(model: HarnessModel, asked: HarnessTasks) -> LmReport | None:
    """Evaluate. All processes of the job call this; the first one runs the harness, and the others compute with it.

    ``output_dir`` holds ``results_TIME.json`` (and ``samples_TASK_TIME.jsonl``) of the harness, for each part of a
    suite in a folder of the part's name; ``summary.json``; and ``answers/``, from which a killed evaluation resumes.

    Args:
        model: what is evaluated, and how it runs.
        asked: what it is asked.

    Returns:
        The figures, on the first process; None on others.

    Raises:
        GritError: lm-eval is missing, a task or a model that cannot be used, or results of another model in
            ``output_dir``.
    """
    check_output(Path(asked.output_dir) / SUMMARY)
    import_lm_eval(asked.allow_downloads)
    if asked.confirm_run_unsafe_code:
        os.environ.setdefault("HF_ALLOW_CODE_EVAL", "1")  # the metric's own switch
    from megatron_grit.inference.loading import model_folder

    folder = model_folder(model.checkpoint)
    loader, parts = None, parts_of(asked.tasks, asked.num_fewshot)
    loaded: dict[str, list[Any]] = {}
    if job_rank() == 0:  # before the model: what cannot be evaluated is found at once
        loader = TaskLoader(asked.include_path)
        loader.check(parts, asked.confirm_run_unsafe_code)
        loaded = {part.name: loader.load(part) for part in parts}
    say_loading()
    from megatron_grit.evaluation.lm.adapter import MegatronGritLM
    from megatron_grit.inference.text_files import model_identity

    lm = MegatronGritLM.leading(model)
    if loader is None:
        lm.runner.follow()
        return None
    try:
        names = ("content", "device", "versions")
        identity = dict(zip(names, model_identity(folder, lm.model), strict=True))
        lm.keep_answers(Path(asked.output_dir) / ANSWERS, identity)
        figures = {}
        for part in parts:
            figures[part.name] = _evaluate(lm, part, loaded[part.name], loader, model, asked)
    finally:
        lm.runner.finish()
    report = _summed_up(figures, parts)
    write_json(
        Path(asked.output_dir) / SUMMARY,
        {"checkpoint": model.checkpoint, "figures": report.figures, "parts": report.parts, "groups": report.groups}
        | ({"mean": fmean(report.groups.values())} if report.groups else {})
        | {"command": command_line()},
    )
    return report


def _evaluate(
    lm: MegatronGritLM, part: Part, tasks: list[Any], loader: TaskLoader, model: HarnessModel, asked: HarnessTasks
) -> dict[str, dict[str, float]]:
    """Figures of the tasks of a part."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.utils import simple_parse_args_string

    folder = Path(asked.output_dir) / part.name
    tracker = EvaluationTracker(output_path=str(folder / "results.json"))
    given = {field.name: getattr(model, field.name) for field in fields(HarnessModel)}
    try:
        results = simple_evaluate(
            model=lm,
            model_args={name: value for name, value in given.items() if value is not None},
            tasks=tasks,
            task_manager=loader.manager,
            num_fewshot=part.num_fewshot,
            limit=asked.limit,
            bootstrap_iters=asked.bootstrap_iters,
            log_samples=asked.log_samples,
            evaluation_tracker=tracker,
            system_instruction=asked.system,
            apply_chat_template=asked.apply_chat_template,
            fewshot_as_multiturn=asked.fewshot_as_multiturn and asked.apply_chat_template,
            gen_kwargs=(part.gen_kwargs | simple_parse_args_string(asked.gen_kwargs)) or None,
            confirm_run_unsafe_code=asked.confirm_run_unsafe_code,
        )
    except (ValueError, AssertionError) as error:  # how lm-eval refuses a task's options
        raise DataError(f"lm-eval refuses {part.name or ', '.join(part.tasks)}: {error}") from error
    assert results is not None
    samples = results.pop("samples", None)
    tracker.save_results_aggregated(results=results, samples=samples)
    for task, some in (samples or {}).items():
        tracker.save_results_samples(task_name=task, samples=some)
    if not list(folder.glob("results_*.json")):
        raise OutputError("lm-eval could not write its results", path=folder)
    known: Mapping[str, Mapping[str, Any]] = results["results"] | results.get("groups", {})
    return {
        task: {name: value for name, value in found.items() if "," in name and isinstance(value, int | float)}
        for task, found in known.items()
    }


def _summed_up(figures: dict[str, dict[str, dict[str, float]]], parts: Sequence[Part]) -> LmReport:
    of_parts = {part.name: part.scale * _figure(part, figures[part.name]) for part in parts if part.metric is not None}
    groups: dict[str, list[float]] = {}
    for part in parts:
        if part.group and part.name in of_parts:
            groups.setdefault(part.group, []).append(of_parts[part.name])
    return LmReport(figures, of_parts, {group: fmean(values) for group, values in groups.items()})


def _figure(part: Part, found: Mapping[str, Mapping[str, float]]) -> float:
    """A part's figure: that of the group that it names, else the mean of its tasks.

    Raises:
        ConfigError: the tasks have no such metric.
    """
    assert part.metric is not None
    values = {
        task: value
        for task, metrics in found.items()
        for name, value in metrics.items()
        if part.metric in (name, name.partition(",")[0])
    }
    if not values:
        raise ConfigError(f"part {part.name}: its tasks have no {part.metric}; change the suite")
    named = [values[task] for task in part.tasks if task in values]
    return fmean(named if len(named) == len(part.tasks) else values.values())
