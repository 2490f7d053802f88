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
    for section in dataclasses.fields(config):
        values = getattr(config, section.name)
        for field in dataclasses.fields(values) if dataclasses.is_dataclass(values) else ():
            key = f"{section.name}.{field.name}"
            if (problem := range_problem(field, getattr(values, field.name))) is not None:
                yield Problem(key, f"{key} {problem}")
            value = getattr(values, field.name)
            if field.metadata.get("path") and "" in (value if isinstance(value, list) else [value]):
                yield Problem(key, f"{key} must not be empty; give a path, or leave it out")
    optimizer, steps = config.optimizer, config.training.steps
    if optimizer.min_lr > optimizer.lr:
        yield Problem("optimizer.min_lr", f"optimizer.min_lr {optimizer.min_lr} is above optimizer.lr {optimizer.lr}")
    if optimizer.warmup_steps is not None and optimizer.warmup_steps > max(steps, 1):
        yield Problem(
            "optimizer.warmup_steps", f"optimizer.warmup_steps {optimizer.warmup_steps} is above training.steps {steps}"
        )
