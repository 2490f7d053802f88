"""What the tasks of an evaluation have in common.

A task is a file of this folder, named as the option that gives its data, with two functions: ``read`` checks the data
before a model is loaded, ``run`` evaluates a model on what ``read`` returned.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_grit.config.commands import command_line
from megatron_grit.config.options import BatchSize, TextLength
from megatron_grit.evaluation.bootstrap import Interval
from megatron_grit.store.files import write_json


@dataclass(kw_only=True)
class Lengths(BatchSize, TextLength):
    """How texts are given to the model."""


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What a task measured."""

    intervals: dict[str, Interval]
    """Figures with their 95 % bootstrap intervals."""
    others: dict[str, Any] = field(default_factory=dict)
    """Counts, figures of a random order, and what follows from the figures."""

    def contents(self) -> dict[str, Any]:
        """What a file of figures holds: all by their names, the ends of the intervals under ``intervals``, and the
        command that measured them, where one did."""
        values = {name: interval.value for name, interval in self.intervals.items()}
        ends = {name: [interval.low, interval.high] for name, interval in self.intervals.items()}
        command = command_line()
        made_by = {} if command is None else {"command": command}
        return self.others | values | {"intervals": ends} | made_by


def write_summary(output: str | Path, figures: Figures) -> Path:
    """Write the figures of a file of single records beside it: OUTPUT.summary.json, without the ending of OUTPUT.

    Returns:
        The path.
    """
    path = Path(output)
    path = path.with_name(f"{path.name.removesuffix('.gz').removesuffix('.jsonl')}.summary.json")
    write_json(path, figures.contents())
    return path


def format_figures(figures: dict[str, Any]) -> str:
    """Lines for a terminal, of :meth:`Figures.contents`: each figure with its interval, and that of a random order."""
    lines = []
    width = max(map(len, ["", *figures["intervals"]]))
    for name, (low, high) in figures["intervals"].items():
        chance = figures.get(f"chance_{name}")
        note = "" if chance is None else f"   chance {chance:.3f}"
        lines.append(f"{name:{max(14, width)}s} {figures[name]:8.3f}   95 % interval {low:.3f} to {high:.3f}{note}")
    return "\n".join(lines)
