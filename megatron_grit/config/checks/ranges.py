"""Smallest and largest values of the numbers in a configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from megatron_grit.config.checks.problem import Problem
from megatron_grit.config.knob import range_problem
from megatron_grit.config.schema import RunConfig


def range_problems(config: RunConfig) -> Iterator[Problem]:
    """Numbers outside the range that their field declares, and paths that are empty."""
    if not config.output_dir:
        yield Problem("output_dir", "output_dir must not be empty; give a directory, such as runs/NAME")
    yield from _section_problems(config, "")
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
        if (problem := range_problem(field, value)) is not None:
            yield Problem(key, f"{key} {problem}")
        if prefix and field.metadata.get("path") and "" in (value if isinstance(value, list) else [value]):
            yield Problem(key, f"{key} must not be empty; give a path, or leave it out")
