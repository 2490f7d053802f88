"""What is written about a run: metrics.jsonl, TensorBoard, Weights & Biases, a progress bar. All on rank 0."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from megatron_grit.config.kinds import loss_name, trained_kinds
from megatron_grit.config.schema import RunConfig
from megatron_grit.errors import ConfigError
from megatron_grit.parallel.context import ParallelContext
from megatron_grit.store.files import replacing
from megatron_grit.store.progress import Progress
from megatron_grit.training.validation.evaluation import EVALUATION

_NOT_PLOTTED = ("step", "seconds")
VALIDATION = "valid_"
"""What the names of figures of :mod:`~megatron_grit.training.validation.loss` begin with."""


_MEASURED = (VALIDATION, EVALUATION)


def _plots(record: dict[str, Any]) -> dict[str, Any]:
    """Names and values for plots: train/loss, valid/loss, eval/heldout/ndcg_at_10."""

    def plotted(name: str) -> str:
        if name.startswith(VALIDATION):
            return f"valid/{name.removeprefix(VALIDATION)}"
        return name if name.startswith(EVALUATION) else f"train/{name}"

    return {plotted(name): value for name, value in record.items() if name not in _NOT_PLOTTED}


class Callback(Protocol):
    """Told of every step."""

    def after_step(self, record: dict[str, Any]) -> None:
        """Runs right after the optimizer step, with the step's metrics."""
        ...

    def close(self) -> None:
        """Runs at the end, also of a run that fails."""
        ...


def build_callbacks(config: RunConfig, context: ParallelContext, start_step: int) -> list[Callback]:
    """The callbacks that a configuration asks for; none but on rank 0."""
    if context.rank != 0:
        return []
    metrics = Path(config.output_dir) / "metrics.jsonl"
    callbacks: list[Callback] = [MetricsFile(metrics, config.logging.interval, start_step)]
    if config.logging.tensorboard:
        callbacks.append(TensorBoard(Path(config.output_dir) / "tensorboard"))
    if config.logging.wandb_project is not None:
        callbacks.append(WeightsAndBiases(config))
    if config.logging.progress:
        losses = [loss_name(kind) for kind in trained_kinds(config)]
        callbacks.append(ProgressBar(start_step, config.training.steps, losses))
    return callbacks


class MetricsFile:
    """One JSON object a line.

    On resume the lines after the checkpoint's step are dropped, so that the file reads as one uninterrupted run.
    """

    def __init__(self, path: Path, interval: int, start_step: int) -> None:
        self.interval = max(1, interval)
        kept = _lines_up_to(path, start_step) if path.exists() else []
        with replacing(path) as file:
            file.writelines(kept)
        self.file = path.open("a")

    def after_step(self, record: dict[str, Any]) -> None:
        """Append the record at every interval, after a measurement, and of a step whose numbers are not finite, which
        JSON has as null."""
        finite = {name: value if math.isfinite(value) else None for name, value in record.items()}
        is_measured = any(name.startswith(_MEASURED) for name in record)
        if record["step"] % self.interval == 0 or is_measured or None in finite.values():
            self.file.write(json.dumps(finite) + "\n")
            self.file.flush()

    def close(self) -> None:
        """Close the file."""
        self.file.close()


def _lines_up_to(path: Path, step: int) -> list[str]:
    kept = []
    for line in path.read_text().splitlines(keepends=True):
        try:
            record = json.loads(line)
        except ValueError:  # a line cut short by a kill
            break
        if record["step"] <= step:
            kept.append(line)
    return kept


class TensorBoard:
    """Scalars for TensorBoard."""

    def __init__(self, directory: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError("logging.tensorboard needs the tensorboard package: pip install tensorboard") from error
        self.writer = SummaryWriter(str(directory))

    def after_step(self, record: dict[str, Any]) -> None:
        """Add each metric."""
        for name, value in _plots(record).items():
            self.writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        """Flush and close."""
        self.writer.close()


class WeightsAndBiases:
    """Metrics and configuration for Weights & Biases."""

    def __init__(self, config: RunConfig) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ConfigError("logging.wandb_project needs the wandb package: pip install wandb") from error
        from dataclasses import asdict

        self.run = wandb.init(project=config.logging.wandb_project, dir=config.output_dir, config=asdict(config))

    def after_step(self, record: dict[str, Any]) -> None:
        """Log each metric."""
        self.run.log(_plots(record), step=record["step"])

    def close(self) -> None:
        """End the run."""
        self.run.finish()


class ProgressBar:
    """Steps, losses and speed: a bar in a terminal, now and then a line in a log.

    Args:
        start_step: steps that are done.
        num_steps: of the run.
        losses: names of the metrics that are shown.
    """

    def __init__(self, start_step: int, num_steps: int, losses: Sequence[str]) -> None:
        self._losses = losses
        self.bar = Progress(num_steps, "training", "step")
        self.bar.skip(start_step)

    def after_step(self, record: dict[str, Any]) -> None:
        """Advance by one."""
        shown = [f"{name} {record[name]:.3f}" for name in self._losses if name in record]
        self.bar.update(1, ", ".join([*shown, f"{record['tokens_per_second']:,.0f} tok/s"]))

    def close(self) -> None:
        """Leave the bar as it is."""
        self.bar.close()
