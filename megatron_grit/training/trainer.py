"""The loop, and nothing else: what a step does is in :mod:`step`, what is written about it in :mod:`callbacks`."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

from megatron_grit.config.checkpoint_folder import started_from
from megatron_grit.config.checks.checkpoint import check_same_model, check_same_parameters, finished_lines
from megatron_grit.config.checks.evaluation import evaluation_lines
from megatron_grit.config.checks.run import check, mesh_summary
from megatron_grit.config.parse import save_config
from megatron_grit.config.schema import RunConfig
from megatron_grit.data.chat.run_chat import run_chat
from megatron_grit.data.rows.loader import GritDataLoader
from megatron_grit.data.rows.prospects import prospects
from megatron_grit.data.rows.version_follower import VersionFollower
from megatron_grit.data.text.tokenizer import load_tokenizer
from megatron_grit.errors import ConfigError
from megatron_grit.models.adapters import count_trainable
from megatron_grit.models.decoder import GritDecoder, build_chunks
from megatron_grit.parallel import positions
from megatron_grit.parallel.context import ParallelContext
from megatron_grit.parallel.devices import warn_of_slow_bf16
from megatron_grit.parallel.launch import parallel_job
from megatron_grit.parallel.watch import JobWatch, is_broken_connection
from megatron_grit.store.environment import restart_line
from megatron_grit.store.files import write_json
from megatron_grit.store.lock import locked_folder
from megatron_grit.store.logs import configure_logging, get_logger
from megatron_grit.training.audit.run import audit
from megatron_grit.training.base_weights import (
    base_fingerprint,
    check_base,
    check_same_adapter,
    describe_base,
    prepare_base,
)
from megatron_grit.training.callbacks import Callback, MetricsFile, build_callbacks
from megatron_grit.training.checkpoint import (
    Restored,
    list_checkpoints,
    load_adapters,
    load_training_state,
    load_weights,
    read_state,
    resolve_checkpoint,
)
from megatron_grit.training.checkpoint_save import CheckpointSaver, clear_leftovers
from megatron_grit.training.estimate_report import EstimateReport, MemoryMeter
from megatron_grit.training.megatron_checkpoint import find_megatron_checkpoint
from megatron_grit.training.objectives.base import RunStart
from megatron_grit.training.optimizer import (
    build_optimizer,
    build_schedule,
    gather_weights,
    set_learning_rate,
    wrap_chunks,
)
from megatron_grit.training.restore_checks import check_next_records, check_random_states, check_versions_read
from megatron_grit.training.step import TrainStep
from megatron_grit.training.stop import StopRequest
from megatron_grit.training.teacher.build import build_teacher, check_same_teacher
from megatron_grit.training.teacher.source import TeacherSource
from megatron_grit.training.validation.evaluation import EvaluatorSource, evaluate_undisturbed
from megatron_grit.training.validation.loss import Validation, describe
from megatron_grit.training.validation.standings import Standings

log = get_logger(__name__)

AUDITED_STEPS = 2
"""First steps whose data the start-up audit looks at."""


InitialWeights = Callable[[Sequence[GritDecoder], ParallelContext], None]
"""Fills the weights of this process's chunks. Collective over all ranks."""


def train(
    config: RunConfig,
    initial_weights: InitialWeights | None = None,
    initial_adapters: InitialWeights | None = None,
    teacher: TeacherSource | None = None,
    evaluator: EvaluatorSource | None = None,
) -> None:
    """Run a configuration to its last step, from the newest checkpoint of its output directory if there is one.

    Args:
        config: the resolved configuration.
        initial_weights: where the weights of a fresh start, and of the base of adapters, come from, if neither from
            ``checkpoint.load`` nor drawn.
        initial_adapters: fills the adapters of a fresh start, if neither ``adapter.load`` is a checkpoint of ours nor
            they are drawn.
        teacher: where ``loss.teacher.model`` comes from, if it is no checkpoint of ours.
        evaluator: measures ``evaluation.tasks``.

    Raises:
        GritError: whatever the user can repair: configuration, mesh, data, checkpoint, numerics.
    """
    configure_logging()
    minutes = config.parallel.timeout_minutes
    with parallel_job(config.parallel, config.training.seed) as context, JobWatch(context, minutes):
        check(config, context.world_size)
        # A second run would remove what the first one is writing. The other ranks hear of it from the first.
        with locked_folder(Path(config.output_dir)) if context.rank == 0 else nullcontext():
            Trainer(config, context, initial_weights, initial_adapters, teacher, evaluator).run()


class Trainer:
    """Everything that a run holds, built in the order in which it can fail: data first, then the model."""

    def __init__(
        self,
        config: RunConfig,
        context: ParallelContext,
        initial_weights: InitialWeights | None = None,
        initial_adapters: InitialWeights | None = None,
        teacher: TeacherSource | None = None,
        evaluator: EvaluatorSource | None = None,
    ) -> None:
        if config.data.tokenizer is None:
            raise ConfigError("data.tokenizer is not set; give a SentencePiece model or a tokenizer.json")
        self.config, self.context = config, context
        self.initial_weights, self.initial_adapters = initial_weights, initial_adapters
        self.tokenizer = load_tokenizer(config.data.tokenizer)
        if config.evaluation.tasks and evaluator is None:
            raise ConfigError(
                "evaluation.tasks is set, but this run was not given what measures them; start it with megatron-grit "
                "train"
            )
        log.info("reading the data")
        positions.enter("opening data")
        self.loader = GritDataLoader(
            config,
            self.tokenizer,
            context.data_rank,
            context.data_size,
            context.row_multiple,
            equal_rows=context.pipeline_size > 1,
        )
        vocab_size = config.model.vocab_size or self.tokenizer.vocab_size
        self.report = EstimateReport(config, context, vocab_size, MemoryMeter(context.device))
        self.chat = run_chat(config, self.tokenizer, started_from(config), self.loader.metas)
        if context.rank == 0:
            for line in prospects(config, self.tokenizer, self.chat):
                log.info(line)
        log.info("building the model")
        warn_of_slow_bf16(context.device, config.training.precision, "training.precision")
        positions.enter("building the model")
        self.chunks = build_chunks(config, vocab_size, context)
        self.wrapped = wrap_chunks(self.chunks, config.parallel.overlap)
        self.optimizer = build_optimizer(config, self.wrapped)
        self.schedule = build_schedule(config, self.optimizer)
        self.teacher = build_teacher(config, context, self.tokenizer, self.chunks, teacher)
        self.step = TrainStep(config, context, self.wrapped, self.optimizer, self.teacher)
        self.validation = Validation(config, self.tokenizer, context, self.wrapped) if config.data.valid else None
        make = evaluator if config.evaluation.tasks else None
        self.evaluator = None if make is None else make(config, context, self.tokenizer, self.chat)
        self.standings = Standings(config.evaluation, config.output_dir)
        others = [] if self.validation is None else [self.validation.loader]
        self.follower = VersionFollower(config, context, self.loader, others)
        self.saver = CheckpointSaver(config, context, self.tokenizer, self.loader, self._saved, self.chat)
        self.saver.teacher = None if self.teacher is None else self.teacher.fingerprint
        self.restored: Restored | None = None

    def run(self) -> None:
        """Train from where the run stands to the last step."""
        config = self.config
        clear_leftovers(config.output_dir, self.context)
        log.info("loading weights")
        positions.enter("restoring")
        start = self._restore()
        saved = None if self.restored is None else self.restored.evaluation
        self.standings.restore(saved, is_writer=self.context.rank == 0 and not config.training.skip_train)
        if finished := finished_lines(config):
            return log.info(*finished)
        keeps_data = self.restored is not None and config.checkpoint.same_data
        self.follower.start(self.restored.versions_read if self.restored is not None and keeps_data else None)
        if config.training.skip_train:
            return self._only_validate(start)
        if self.context.rank == 0:
            save_config(config, Path(config.output_dir) / "config.yaml")
        for line in (mesh_summary(config, self.context.world_size), *evaluation_lines(config)):
            log.info(line)
        trained, total = count_trainable(self.chunks)
        log.info(f"{trained:,} of {total:,} parameters on rank 0 are trained; steps {start} to {config.training.steps}")
        self.step.guard.resume(start)
        self._start_objectives(start)
        callbacks = build_callbacks(config, self.context, start)
        try:
            minutes = config.training.max_minutes
            with StopRequest(self.context, None if minutes is None else 60 * minutes) as stop:
                self._loop(start, callbacks, stop)
                self.saver.finish()
        except Exception as error:
            if not is_broken_connection(error):  # without the other ranks there is nothing to finish
                self.saver.finish_after_error()
            raise
        finally:
            self.follower.close()
            for callback in callbacks:
                callback.close()

    def _start_objectives(self, step: int) -> None:
        """Have objectives prepare for the steps that are left, of which a checkpoint keeps what they say."""
        saved = {} if self.restored is None else read_state(self.restored.path).get("objectives", {})
        for objective in self.step.objectives:
            positions.enter(f"starting {objective.kind}", step)
            run = RunStart(
                step=step,
                streams=self.loader.streams,
                chunks=self.chunks,
                pad_id=self.tokenizer.pad_id,
                base=None if self.saver.base is None else self.saver.base["fingerprint"],
                saved=None if self.restored is None else saved.get(objective.kind, {}),
            )
            if kept := objective.start(run):
                self.saver.objectives[objective.kind] = kept

    def _only_validate(self, step: int) -> None:
        """Measure the weights that are there, and add a line to metrics.jsonl."""
        config, output = self.config, Path(self.config.output_dir)
        if self.restored is None and self.initial_weights is None and config.checkpoint.load is None:
            raise ConfigError(
                f"training.skip_train measures a checkpoint, and {output} holds none; set checkpoint.load"
            )
        restored = self.restored
        if restored is not None and config.checkpoint.same_data:
            check_versions_read(restored.path, restored.versions_read, self.loader, max(step - 1, 0))
        figures = self.measure(step, always=True)
        if self.context.rank == 0:
            output.mkdir(parents=True, exist_ok=True)
            file = MetricsFile(output / "metrics.jsonl", 1, start_step=sys.maxsize)
            file.after_step({"step": step} | figures)
            file.close()

    def measure(self, step: int, *, always: bool = False) -> dict[str, float]:
        """Figures of ``data.valid`` and ``evaluation.tasks`` that are due after a step. Collective.

        Args:
            step: steps that were trained.
            always: all of them are due.
        """
        valid, every = self.config.training.valid_interval, self.config.evaluation.every
        figures: dict[str, float] = {}
        if self.validation is not None and (always or (valid and step % valid == 0)):
            figures |= self.validate(self.validation, step)
        if self.evaluator is not None and (always or (every and step % every == 0)):
            figures |= evaluate_undisturbed(self.evaluator, self.config, self.wrapped, step)
        return figures

    def validate(self, validation: Validation, step: int) -> dict[str, float]:
        """Loss and perplexity on ``data.valid`` after a step. Collective."""
        positions.enter("validation", step)
        validation.loader.read_as(self.loader, max(step - 1, 0))
        figures = validation()
        log.info(f"step {step}: {describe(figures)}")
        return figures

    def _restore(self) -> int:
        """Weights and step to start from."""
        checkpoints = list_checkpoints(self.config.output_dir) if self.config.checkpoint.resume else []
        if not self.config.checkpoint.resume and (line := restart_line()) is not None:
            log.warning(f"{line} begins at step 0, because checkpoint.resume is false")
        if checkpoints:
            check_same_model(checkpoints[-1], self.config)
            check_same_teacher(checkpoints[-1], self.config.loss.teacher.model, self.saver.teacher)
            if self.config.adapter.kind != "none":
                self._load_initial_weights()
                self._take_as_base(checkpoints[-1])
            optimizer = None if self.config.training.skip_train else self.optimizer
            self.restored = load_training_state(checkpoints[-1], self.chunks, optimizer, self.context)
            log.info(f"resumed from {checkpoints[-1]}")
            return self.restored.step
        if self._load_initial_weights():
            if self.config.adapter.kind != "none":
                given = self.config.adapter.load if self.initial_adapters is None else None
                self._take_as_base(None if given is None else resolve_checkpoint(given))
                self._load_adapters()
            self.optimizer.reload_model_params()
        return 0

    def _take_as_base(self, checkpoint: Path | None) -> None:
        """Put adapters beside the weights that are there. ``checkpoint``: refuse others than its own."""
        fingerprint = base_fingerprint(self.chunks, self.context)
        if checkpoint is not None:
            check_base(checkpoint, read_state(checkpoint), fingerprint)
        self.saver.base = describe_base(self.config, fingerprint)
        prepare_base(self.chunks, self.config.adapter)

    def _load_adapters(self) -> None:
        """Adapters of a fresh start that are not drawn."""
        if self.initial_adapters is not None:
            self.initial_adapters(self.chunks, self.context)
        elif self.config.adapter.load is not None:
            path = resolve_checkpoint(self.config.adapter.load)
            check_same_adapter(path, self.config)
            load_adapters(path, self.chunks, self.context)
            log.info(f"started from the adapters of {path}")

    def _load_initial_weights(self) -> bool:
        """Weights that a fresh start does not draw. Returns whether there are any."""
        given = self.config.checkpoint.load
        if given is not None:
            path = find_megatron_checkpoint(Path(given)) or resolve_checkpoint(given)
            check_same_parameters(path, self.config)
            load_weights(path, self.chunks, self.context)
            log.info(f"started from the weights of {path}")
        elif self.initial_weights is not None:
            self.initial_weights(self.chunks, self.context)
        elif self.config.model.pretrained is not None:
            raise ConfigError(
                "model.pretrained is set, but this run was not given its weights; start it with megatron-grit train"
            )
        return given is not None or self.initial_weights is not None

    def _check_restored(self, start: int) -> None:
        """Just before the first step: whatever was built since the restore may have drawn random numbers."""
        restored = self.restored
        if restored is None:
            return
        if restored.random is not None:
            check_random_states(restored.path, restored.random)
        if not self.config.checkpoint.same_data:
            return
        check_versions_read(restored.path, restored.versions_read, self.loader, start)
        if restored.next_records is not None:
            check_next_records(restored.path, restored.next_records, self.loader.fingerprint(start), start)

    def _loop(self, start: int, callbacks: list[Callback], stop: StopRequest) -> None:
        config, last = self.config, self.config.training.steps
        if start == last == 0:
            self.save(0, wait=True)
        if start < last and config.training.audit == "on":
            first = (self.loader.batch(step) for step in range(start, min(start + AUDITED_STEPS, last)))
            audit(config, self.context, self.wrapped, self.tokenizer, first)
        if start < last:
            self._check_restored(start)
        log.info("training; the first step takes longer than the others")
        positions.enter("loading data", start + 1)
        for batch in self.loader.iterate(start, last):
            began = time.perf_counter()
            learning_rate = set_learning_rate(self.schedule, batch.step)
            metrics = self.step(batch)
            seconds = time.perf_counter() - began
            if self.context.rank == 0:
                self.report.after_step(batch, seconds)
            trained = batch.step + 1
            record = (
                {"step": trained}
                | metrics
                | {
                    "lr": learning_rate,
                    "tokens": batch.num_tokens,
                    "tokens_per_second": batch.num_tokens / seconds,
                    "padding_fraction": 1 - batch.num_tokens / batch.num_padded_tokens,
                    "seconds": seconds,
                }
            )
            record |= self.measure(trained, always=trained == last)
            is_best = self.standings.take(record)
            ends = trained == last or self.standings.stops
            for callback in callbacks:
                callback.after_step(record)
            interval = config.checkpoint.save_interval
            positions.at("agreeing on a stop")
            stopping, version = stop.on_any_rank(self.follower.newest())
            self.follower.take(version, trained)
            positions.at("saving")
            if ends or stopping or is_best or (interval and trained % interval == 0):
                self.save(trained, wait=ends or stopping)
            self.saver.poll()
            if self.standings.stops:
                log.info(self.standings.why_it_stops(trained))
                break
            if stopping and trained < last:
                log.info(f"stopped after step {trained}; the same command resumes from there")
                raise SystemExit(stop.exit_status)
            positions.enter("loading data", trained + 1)

    def save(self, step: int, *, wait: bool) -> None:
        """Write a checkpoint, or begin to. ``wait``: it is whole on return."""
        if self.config.parallel.overlap:
            gather_weights(self.wrapped)
        optimizer = self.optimizer if step else None  # before the first step it has no states
        self.saver.evaluation = self.standings.state()
        self.saver.save(self.chunks, optimizer, step, wait=wait)

    def _saved(self, step: int, path: Path) -> None:
        log.info(f"saved {path}")
        if self.context.rank == 0:
            write_json(Path(self.config.output_dir) / "blend_counts.json", self.loader.source_counts(step))
            self.standings.saved(step)
