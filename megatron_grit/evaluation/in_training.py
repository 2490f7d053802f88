"""Evaluates the model of a run while it trains, on the run's mesh: ``evaluation.tasks``.

Each task is the file of :mod:`megatron_grit.evaluation.tasks` that ``megatron-grit evaluate`` takes too, so its figures
are those of the checkpoint of the step, but for the order of sums.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_grit.config.checks.evaluation import evaluation_tasks
from megatron_grit.config.checks.problem import Problem
from megatron_grit.config.checks.run import names_data
from megatron_grit.config.schema import RunConfig
from megatron_grit.config.schema.evaluation import FIGURES, EvaluationConfig, TaskSpec, is_text_file
from megatron_grit.data.text.records import BadLine, read_records
from megatron_grit.errors import DataError, GritError, NumericsError
from megatron_grit.evaluation.checkpoint import TASKS
from megatron_grit.evaluation.tasks.task import Figures, Lengths
from megatron_grit.store.files import write_json
from megatron_grit.store.logs import get_logger

if TYPE_CHECKING:
    from megatron_grit.data.chat.chat import Chat
    from megatron_grit.data.text.tokenizer import Tokenizer
    from megatron_grit.inference.model import GritModel
    from megatron_grit.models.decoder import GritDecoder
    from megatron_grit.parallel.context import ParallelContext
    from megatron_grit.training.validation.evaluation import EvaluatorSource

log = get_logger(__name__)

FOLDER = "evaluations"
"""Of an output directory: a JSON file for each evaluated step, with intervals."""


def training_evaluator(config: RunConfig) -> EvaluatorSource | None:
    """What measures ``evaluation.tasks``, whose data are read here; None: there are none.

    Raises:
        GritError: data that cannot be used.
    """
    specs = evaluation_tasks(config)
    if not specs:
        return None
    data = {spec.name: _read(spec, config.evaluation) for spec in specs}

    def make(config: RunConfig, context: ParallelContext, tokenizer: Tokenizer, chat: Chat) -> TrainingEvaluator:
        return TrainingEvaluator(config, context, tokenizer, chat, data)

    return make


def _read(spec: TaskSpec, knobs: EvaluationConfig) -> Any:
    """The data of a task.

    Raises:
        GritError: they cannot be used.
    """
    if spec.task == "lm":
        from megatron_grit.evaluation.lm.in_run import HarnessTask

        return HarnessTask(spec.data, spec.name, knobs)
    if _is_texts(spec):
        for record in read_records(spec.data):
            if isinstance(record, BadLine):
                raise record.error
            if record.text is None:
                message = 'is no text; give {"text": ...}, or the prefix of an indexed file of what else is measured'
                raise DataError(message, path=record.path, line=record.line)
    return TASKS[spec.task].read(spec.data)


def _is_texts(spec: TaskSpec) -> bool:
    return spec.task == "perplexity" and is_text_file(spec.data)


def look_ahead_of_run(config: RunConfig, problems: Sequence[Problem]) -> tuple[list[GritError], list[str]]:
    """What the start of a run would refuse on this node, of its data, which are looked at if they can be read, and of
    what it is evaluated on; and what it would say of the data.

    Args:
        config: the run.
        problems: those that were found in it.
    """
    from megatron_grit.data.rows.prospects import look_ahead
    from megatron_grit.parallel.devices import device_errors
    from megatron_grit.parallel.rendezvous import port_errors

    errors: list[GritError] = [*device_errors(config.parallel.device), *port_errors()]
    found, lines = look_ahead(config) if not any(map(names_data, problems)) else ([], [])
    errors += found
    if not any(problem.key.startswith("evaluation.") for problem in problems):
        try:
            training_evaluator(config)
        except GritError as error:
            errors.append(error)
    return errors, lines


class TrainingEvaluator:
    """Measures the tasks of a run.

    Args:
        config: the run.
        context: this process's place in the mesh.
        tokenizer: of the run.
        chat: how its model converses.
        data: of each task by its name, as the task's ``read`` returned them.
    """

    def __init__(
        self,
        config: RunConfig,
        context: ParallelContext,
        tokenizer: Tokenizer,
        chat: Chat,
        data: Mapping[str, Any],
    ) -> None:
        from megatron_grit.inference.score import read_supervised

        self._config, self._context, self._tokenizer, self._chat = config, context, tokenizer, chat
        self._data = dict(data)
        knobs = config.evaluation
        self._lengths = Lengths(max_length=knobs.max_length, batch_tokens=knobs.batch_tokens)
        self._model: GritModel | None = None
        for spec in evaluation_tasks(config):
            if _is_texts(spec):
                self._data[spec.name] = self._tokenised(spec)
            if spec.task == "perplexity":  # what cannot be used is told before the first step
                read_supervised(self._data[spec.name], tokenizer, config.model.max_position_embeddings)

    def _tokenised(self, spec: TaskSpec) -> str:
        """The prefix of an indexed file of texts; long ones are split. Collective."""
        import torch.distributed as dist

        from megatron_grit.data.builders.grit_builder import build_grit
        from megatron_grit.data.builders.record_encoder import Limits

        prefix = Path(self._config.output_dir) / "cache" / "evaluation" / spec.name
        if self._context.rank == 0:
            limits = Limits(generative=self._config.model.max_position_embeddings)
            prefix.parent.mkdir(parents=True, exist_ok=True)
            build_grit([spec.data], prefix, self._tokenizer.path, limits, over_long="split", overwrite=True)
        dist.barrier()
        return str(prefix)

    def __call__(self, chunks: Sequence[GritDecoder], step: int) -> dict[str, float]:
        """As :class:`~megatron_grit.training.validation.evaluation.Evaluator`. Rank 0 writes the figures with their
        intervals to ``output_dir/evaluations``."""
        model = self._of(chunks)
        figures: dict[str, float] = {}
        contents: dict[str, Any] = {"step": step, "world_size": self._context.world_size, "tasks": {}}
        for spec in evaluation_tasks(self._config):
            found = self._measure(spec, model, step).contents()
            command = found.pop("command", None)
            contents |= {} if command is None else {"command": command}
            contents["tasks"][spec.name] = {"task": spec.task, "data": spec.data} | found
            for name in FIGURES[spec.task] or found["figures"]:
                figures[f"{spec.name}/{name}"] = float(found[name])
        if self._context.rank == 0:
            write_json(Path(self._config.output_dir) / FOLDER / f"step_{step:08d}.json", contents)
        return figures

    def _measure(self, spec: TaskSpec, model: GritModel, step: int) -> Figures:
        began = time.perf_counter()
        try:
            data = self._data[spec.name]
            found: Figures = data.run(model) if spec.task == "lm" else TASKS[spec.task].run(model, data, self._lengths)
        except ValueError as error:
            if "finite" not in str(error):
                raise
            raise NumericsError(
                f"{spec.name} cannot be measured after step {step}: {error}; was the training run stable?"
            ) from error
        told = ", ".join(f"{name} {interval}" for name, interval in found.intervals.items())
        log.info(f"step {step}: {spec.name}: {told} ({time.perf_counter() - began:.1f} s)")
        return found

    def _of(self, chunks: Sequence[GritDecoder]) -> GritModel:
        """The chunks of the run as a model; every data parallel rank is a replica of one group."""
        if self._model is None:
            from megatron_grit.inference.model import GritModel
            from megatron_grit.inference.model_group import whole_job

            group = whole_job(self._context)
            self._model = GritModel(self._config, list(chunks), self._tokenizer, self._chat, group)
        return self._model
