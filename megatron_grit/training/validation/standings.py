"""What the measurements of a run have said so far: the best of them, and how long none has been better."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_grit.config.checkpoint_folder import BEST
from megatron_grit.config.checks.evaluation import HELD_OUT, lower_is_better
from megatron_grit.config.schema.evaluation import EvaluationConfig, Mode
from megatron_grit.store.files import write_json
from megatron_grit.training.validation.evaluation import EVALUATION


@dataclass(kw_only=True)
class Standing:
    """A figure over the measurements of a run."""

    metric: str
    mode: Mode = "auto"
    min_delta: float = 0.0
    value: float | None = None
    """The best so far. None: it was not measured yet, or never finite."""
    step: int = 0
    """Steps that were trained when it was measured."""
    waited: int = 0
    """Measurements since then."""

    def take(self, record: Mapping[str, Any]) -> bool:
        """Look at the metrics of a step. Returns whether the figure is among them and better than before."""
        found = record.get(self.metric if self.metric in HELD_OUT else EVALUATION + self.metric)
        if found is None:
            return False
        sign = -1 if lower_is_better(self.metric, self.mode) else 1
        gain = math.inf if self.value is None else sign * (found - self.value)
        if math.isfinite(found) and gain > self.min_delta:
            self.value, self.step, self.waited = found, record["step"], 0
            return True
        self.waited += 1
        return False

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        return {name: getattr(self, name) for name in ("metric", "value", "step", "waited")}

    def restore(self, state: Mapping[str, Any] | None) -> None:
        """Go on from :meth:`state`, where that is of the same figure."""
        if state is not None and state.get("metric") == self.metric:
            self.value, self.step, self.waited = state["value"], int(state["step"]), int(state["waited"])


class Standings:
    """The figures that ``evaluation.best`` and ``evaluation.early_stopping`` follow.

    Args:
        knobs: the section.
        output_dir: of the run, where the best checkpoint is named.
    """

    def __init__(self, knobs: EvaluationConfig, output_dir: str | Path) -> None:
        best, stopping = knobs.best, knobs.early_stopping
        self._output_dir, self._patience = Path(output_dir), stopping.patience
        self.best = None if best.metric is None else Standing(metric=best.metric, mode=best.mode)
        self.stopping = (
            None
            if stopping.metric is None
            else Standing(metric=stopping.metric, mode=stopping.mode, min_delta=stopping.min_delta)
        )

    def take(self, record: Mapping[str, Any]) -> bool:
        """Look at the metrics of a step. Returns whether its checkpoint is the best and has to be kept."""
        if self.stopping is not None:
            self.stopping.take(record)
        return self.best is not None and self.best.take(record)

    @property
    def stops(self) -> bool:
        """Whether the run ends because nothing has become better for long enough."""
        return self.stopping is not None and self.stopping.waited >= self._patience

    def why_it_stops(self, step: int) -> str:
        """A line for the log."""
        assert self.stopping is not None
        best = f"{self.stopping.value} after step {self.stopping.step}" if self.stopping.value is not None else "none"
        return (
            f"stopped early after step {step}: {self.stopping.metric} was no better in {self.stopping.waited} "
            f"measurements; the best is {best}"
        )

    def state(self) -> dict[str, Any] | None:
        """What a checkpoint holds; None: nothing is followed."""
        parts = {"best": self.best, "early_stopping": self.stopping}
        return {name: part.state() for name, part in parts.items() if part is not None} or None

    def restore(self, state: Mapping[str, Any] | None, *, is_writer: bool) -> None:
        """Go on from a checkpoint's :meth:`state`. A best checkpoint that is no longer there is forgotten.

        Args:
            state: None for a run that starts: the record of another run in its directory is removed.
            is_writer: whether this process writes the record.
        """
        if state is None:
            if is_writer:
                (self._output_dir / BEST).unlink(missing_ok=True)
            return
        for name, part in {"best": self.best, "early_stopping": self.stopping}.items():
            if part is not None:
                part.restore(state.get(name))
        if self.best is None or self.best.value is None:
            return
        if not (self._output_dir / self._checkpoint / "state.json").is_file():
            self.best.value, self.best.step, self.best.waited = None, 0, 0
        elif is_writer:
            self._write()

    @property
    def _checkpoint(self) -> str:
        assert self.best is not None
        return f"checkpoints/step_{self.best.step:08d}"

    def saved(self, step: int) -> None:
        """A checkpoint is whole: if it is the best, the record names it from now on. By the process that writes."""
        if self.best is not None and self.best.value is not None and self.best.step == step:
            self._write()

    def _write(self) -> None:
        assert self.best is not None
        way = "min" if lower_is_better(self.best.metric, self.best.mode) else "max"
        found = {"metric": self.best.metric, "mode": way, "value": self.best.value, "step": self.best.step}
        write_json(self._output_dir / BEST, found | {"checkpoint": self._checkpoint})
