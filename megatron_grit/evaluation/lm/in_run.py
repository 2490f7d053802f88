"""Tasks of lm-eval inside a run: the first rank asks, and all ranks of the mesh answer."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_grit.config.commands import suggestion
from megatron_grit.config.options import HarnessModel
from megatron_grit.config.schema.evaluation import EvaluationConfig
from megatron_grit.errors import ConfigError
from megatron_grit.evaluation.bootstrap import Interval
from megatron_grit.evaluation.lm.harness import import_lm_eval
from megatron_grit.evaluation.lm.tasks import Part, TaskLoader
from megatron_grit.evaluation.results import harness_figures
from megatron_grit.evaluation.tasks.task import Figures
from megatron_grit.store.environment import job_rank

if TYPE_CHECKING:
    from megatron_grit.inference.model import GritModel


class HarnessTask:
    """A task or group of lm-eval. Loaded on the first rank alone, which tells the others what to compute.

    Args:
        task: its name, or a YAML file.
        name: of its figures.
        knobs: the section.

    Raises:
        ConfigError: lm-eval is not installed, there is no such task, or it has not the figure that decides.
        DataError: its data are not there.
    """

    def __init__(self, task: str, name: str, knobs: EvaluationConfig) -> None:
        import_lm_eval()
        self._part, self._knobs = Part(name=name, tasks=(task,)), knobs
        self._loader = None
        if job_rank() == 0:
            self._loader = TaskLoader(knobs.include_path)
            self._loader.check([self._part], may_run_code=False)
            self._check_metrics(self._loader.load(self._part))

    def _check_metrics(self, loaded: Sequence[Any]) -> None:
        known = {figure for task in loaded if hasattr(task, "aggregation") for figure in _figures_of(task)}
        for metric in (self._knobs.best.metric, self._knobs.early_stopping.metric):
            name, _, figure = (metric or "").partition("/")
            if name == self._part.name and known and figure not in known:
                there = ", ".join(sorted(known))
                raise ConfigError(
                    f"evaluation.tasks: {name} has no figure {figure}{suggestion(figure, known)}; it has {there}"
                )

    def run(self, model: GritModel) -> Figures:
        """Figures with 1.96 standard errors to both sides where lm-eval tells any. Collective."""
        from megatron_grit.evaluation.lm.adapter import MegatronGritLM
        from megatron_grit.parallel.collectives import json_from_rank_0

        knobs, context = self._knobs, model.model.context
        options = HarnessModel(checkpoint=model.config.output_dir, batch_tokens=knobs.batch_tokens)
        lm = MegatronGritLM.of_model(model, options)
        found: dict[str, Any] | None = None
        if self._loader is None:
            lm.runner.follow()
        else:
            try:
                found = self._ask(lm)
            finally:
                lm.runner.finish()
        found = json_from_rank_0(found, context)
        (task,) = self._part.tasks
        intervals: dict[str, Interval] = {}
        others: dict[str, Any] = {"figures": []}
        for each, metric, value, margin in harness_figures(found):
            name = metric if each == task or len(found) == 1 else f"{each}/{metric}"
            others["figures"].append(name)
            if margin is None:
                others[name] = value
            else:
                intervals[name] = Interval(value=value, low=value - margin, high=value + margin)
        return Figures(intervals=intervals, others=others)

    def _ask(self, lm: Any) -> dict[str, Any]:
        from lm_eval.evaluator import simple_evaluate

        assert self._loader is not None
        with _seeds_kept():
            results = simple_evaluate(
                model=lm,
                tasks=self._loader.load(self._part),
                task_manager=self._loader.manager,
                limit=self._knobs.limit,
                log_samples=False,
            )
        return {
            task: {name: value for name, value in figures.items() if isinstance(value, int | float)}
            for task, figures in (results["results"] | results.get("groups", {})).items()
        }


def _figures_of(task: Any) -> Iterator[str]:
    filters = [str(each.name) for each in getattr(task, "_filters", [])] or ["none"]
    for metric in task.aggregation():
        for each in filters:
            yield metric if each == "none" else f"{metric},{each}"


@contextmanager
def _seeds_kept() -> Iterator[None]:
    """lm-eval seeds Python's and NumPy's generators, which go on as before here; torch's are the caller's matter."""
    of_python, of_numpy = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)
