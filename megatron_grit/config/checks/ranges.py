"""Values of a configuration that their fields do not allow."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from megatron_grit.config.checks.problem import Problem
from megatron_grit.config.knob import value_problem
from megatron_grit.config.schema import RunConfig


def range_problems(config: RunConfig) -> Iterator[Problem]:
    """Values of another type than their field declares, numbers outside its range, and texts that are empty."""
    found = list(_section_problems(config, ""))
    yield from found
    if found:
        return
    optimizer, steps = config.optimizer, config.training.steps
    if optimizer.min_lr > optimizer.lr:
        yield Problem("optimizer.min_lr", f"optimizer.min_lr {optimizer.min_lr} is above optimizer.lr {optimizer.lr}")
    if optimizer.warmup_steps is not None and optimizer.warmup_steps > max(steps, 1):
        yield Problem(
            "optimizer.warmup_steps", f"optimizer.warmup_steps {optimizer.warmup_steps} is above training.steps {steps}"
        )


def _section_problems(values: object, prefix: str) -> Iterator[Problem]:
    """Of a section's own keys and of the sections in it."""
    for field in dataclasses.fields(values):  # type: ignore[arg-type]
        key, value = f"{prefix}{field.name}", getattr(values, field.name)
        if dataclasses.is_dataclass(value):
            yield from _section_problems(value, f"{key}.")
            continue
        if (problem := value_problem(type(values), field.name, value)) is not None:
            yield Problem(key, f"{key} {problem}")
