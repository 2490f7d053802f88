"""Tiny runs in forked processes, which tell what they restored and trained and can be killed at any call on disk.

They are forked from a process that has imported the engine and done nothing else, so each takes a second or two.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import mmap
import multiprocessing
import os
import random
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import free_port
from benchmarks.retro_kill_campaign import write_inputs
from megatron_grit.config.database.run import resolve_retro_project
from megatron_grit.config.schema import ModelConfig, RunConfig
from megatron_grit.config.schema.retro import RetroConfig
from megatron_grit.data.builders.grit_builder import build_grit
from megatron_grit.data.text.tokenizer import train_sentencepiece
from megatron_grit.parallel.launch import parallel_job
from megatron_grit.parallel.watch import is_broken_connection
from megatron_grit.training.restore_checks import optimizer_parts
from megatron_grit.training.trainer import Trainer

STEPS = 40
"""Of a run that nobody kills."""
KEEP = 2
CALLS = ("mkdir", "rename", "replace", "fsync", "unlink", "rmdir")
PHASES = ("starting", "training", "saving", "writing in the background")
STARTING, TRAINING, SAVING, WRITING = range(4)


def write_data(folder: Path) -> None:
    """Short questions and answers as records of both kinds, and a tokenizer."""
    draw = random.Random(5)
    words = "parser socket buffer thread module stream decoder index queue cursor handler matrix".split()
    pairs = [
        (f"what is the {' '.join(draw.sample(words, 2))} {i}?", " ".join(draw.sample(words, 4))) for i in range(64)
    ]
    embedding = [
        {"query": ["Answer", q], "pos": [["", a]], "neg": [["", pairs[i - 9][1]]]} for i, (q, a) in enumerate(pairs)
    ]
    train_sentencepiece([text for pair in pairs for text in pair], folder / "tokenizer", 300)
    for name, records in {"emb": embedding, "gen": [{"text": list(pair)} for pair in pairs]}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        build_grit([folder / f"{name}.jsonl"], folder / name, folder / "tokenizer.model")


def make_config(folder: Path, output: Path, asynchronous: bool) -> RunConfig:
    """Two layers with dropout, so that random states matter."""
    shape = ModelConfig(num_layers=2, hidden_size=32, ffn_hidden_size=64, num_attention_heads=2, num_query_groups=2)
    config = RunConfig(output_dir=str(output), model=shape)
    config.model.hidden_dropout = config.model.attention_dropout = 0.1
    config.data.tokenizer = str(folder / "tokenizer.model")
    config.data.embedding, config.data.generative = [str(folder / "emb")], [str(folder / "gen")]
    config.data.tokens_per_row, config.data.num_rows_multiple = 256, 2
    config.training.embedding_batch_size, config.training.generative_batch_size = 4, 4
    config.training.steps, config.training.precision = STEPS, "fp32"
    config.parallel.device, config.logging.progress = "cpu", False
    config.checkpoint.save_interval, config.checkpoint.keep = 1, KEEP
    config.checkpoint.asynchronous, config.training.audit = asynchronous, "off"
    return config


def write_database(folder: Path) -> None:
    """Documents and a retrieval database of them, in ``retro``. Made by other processes: this one is to be forked."""
    fork = multiprocessing.get_context("fork")
    writer = fork.Process(target=_build_database, args=(folder / "retro",))
    writer.start()
    writer.join()
    if writer.exitcode:
        raise SystemExit(f"{folder / 'retro'}: the database could not be built")


def _build_database(folder: Path) -> None:
    folder.mkdir()
    settings = write_inputs(folder, fewest_words=8)
    options = [
        f"--{name}={json.dumps(value) if isinstance(value, list) else value}" for name, value in settings.items()
    ]
    command = [sys.executable, "-m", "megatron_grit.cli.retro.build_db", "--project-dir", str(folder / "db"), *options]
    subprocess.run([*command, "--tasks", "build"], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def make_retro_config(folder: Path, output: Path, asynchronous: bool) -> RunConfig:
    """As :func:`make_config`, with a second layer that reads neighbors from :func:`write_database`'s."""
    config = make_config(folder, output, asynchronous)
    config.training.objective, config.data.generative, config.data.tokenizer = "generative", [], None
    config.data.retro_project, config.data.over_long = str(folder / "retro" / "db"), "split"
    config.model.retro = RetroConfig(num_neighbors=2, layers=[1], gate=None, encoder_hidden_dropout=0.1)
    return resolve_retro_project(config, {})


class Phase:
    """What a run is doing, in memory that its parent can read when it is dead."""

    def __init__(self) -> None:
        self._bytes = mmap.mmap(-1, 2)

    def set(self, phase: int) -> None:
        """Of the thread that trains."""
        self._bytes[0] = phase

    @contextlib.contextmanager
    def during(self, phase: int) -> Iterator[None]:
        """A phase of the thread that trains, within another one."""
        before = self._bytes[0]
        self._bytes[0] = phase
        try:
            yield
        finally:
            self._bytes[0] = before

    def set_writing(self, flag: bool) -> None:
        """Of the thread that writes."""
        self._bytes[1] = flag

    def read(self) -> str:
        """The last one that was set."""
        main = self._bytes[0]
        return PHASES[WRITING if main == TRAINING and self._bytes[1] else main]


@dataclass(frozen=True)
class Plan:
    """How a run ends: after a time, or at a call on disk."""

    delay: float = 0.0
    """Seconds to the kill, from the start of the run or what ``after_steps`` says."""
    after_steps: int | None = None
    """Steps to train first, counted from the restore. None: the delay counts from the start."""
    point: int | None = None
    """Die just before this call on disk after the restore, whatever the delay."""
    rewrite: bool = False
    """First write the checkpoint that was loaded once more: it is replaced by another of its name."""
    stagger: float = 0.0
    """Seconds between the death of one rank and of the others."""


def digest(trainer: Trainer) -> str:
    """Of all that training changes on this rank."""
    found = hashlib.sha256()
    for chunk in trainer.chunks:
        for _, parameter in sorted(chunk.named_parameters()):
            found.update(parameter.detach().numpy().tobytes())
    for part in optimizer_parts(trainer.optimizer):
        for state in part.optimizer.state.values():
            found.update(state["exp_avg"].numpy().tobytes() + state["exp_avg_sq"].numpy().tobytes())
            found.update(str(float(state["step"])).encode())
    return found.hexdigest()


def die_at(point: int) -> None:
    """From now on count calls on disk, and kill this process just before the ``point``-th."""
    calls = itertools.count(1)

    def before(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if next(calls) == point:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return call

    for name in CALLS:
        setattr(os, name, before(getattr(os, name)))


def watch_saving(trainer: Trainer, phase: Phase) -> None:
    """Have ``phase`` follow the saver."""
    saver = trainer.saver
    write = saver._write

    def saving(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            with phase.during(SAVING):
                return function(*arguments, **options)

        return call

    def writing(pending: Any) -> None:
        phase.set_writing(True)
        write(pending)
        phase.set_writing(False)

    for name in ("save", "poll", "finish"):
        setattr(saver, name, saving(getattr(saver, name)))
    saver._write = writing  # type: ignore[method-assign]


def run_rank(config: RunConfig, phase: Phase, plan: Plan, say: Callable[[dict[str, Any]], None]) -> None:
    """Train in this process, and tell what was restored and what each step made of it."""
    import torch

    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    with parallel_job(config.parallel, config.training.seed) as context:
        trainer = Trainer(config, context)
        check, after_step = trainer._check_restored, trainer.report.after_step
        watch_saving(trainer, phase)
        last = [0.0]

        def restored(start: int) -> None:
            check(start)
            folder = Path(config.output_dir) / "checkpoints"
            names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
            say({"restored": start, "digest": digest(trainer) if start else "", "beside": names})
            if plan.point is not None and context.rank == 0:
                die_at(plan.point)
            phase.set(TRAINING)
            if plan.rewrite and start:
                trainer.save(start, wait=True)

        def stepped(batch: Any, seconds: float) -> None:
            after_step(batch, seconds)
            now, previous = time.monotonic(), last[0]
            last[0] = now
            say({"step": batch.step + 1, "digest": digest(trainer), "after": previous and now - previous})

        trainer._check_restored = restored  # type: ignore[method-assign]
        trainer.report.after_step = stepped  # type: ignore[method-assign]
        trainer.run()


class Job:
    """A run of one or more forked ranks.

    Args:
        config: what to run.
        num_ranks: processes.
        plan: how it ends.
    """

    def __init__(self, config: RunConfig, num_ranks: int, plan: Plan) -> None:
        self.phase = Phase()
        self._reader, writer = os.pipe()
        self._rest = b""
        port = free_port()
        self.pids = [self._fork(config, rank, num_ranks, port, plan, writer) for rank in range(num_ranks)]
        os.close(writer)

    def _fork(self, config: RunConfig, rank: int, num_ranks: int, port: int, plan: Plan, writer: int) -> int:
        sys.stdout.flush()
        pid = os.fork()
        if pid:
            return pid
        status = 1
        try:
            os.close(self._reader)
            os.setpgid(0, 0)
            if num_ranks > 1:
                os.environ.update(
                    RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(num_ranks), MASTER_ADDR="127.0.0.1"
                )
                os.environ["MASTER_PORT"] = str(port)

            def say(message: dict[str, Any]) -> None:
                os.write(writer, (json.dumps(message) + "\n").encode())  # shorter than PIPE_BUF: never torn

            run_rank(config, self.phase, plan, say if rank == 0 else lambda message: None)
            status = 0
        except BaseException as error:  # the parent tells it
            # A rank whose neighbor was killed is left with a broken connection.
            if rank == 0 or not is_broken_connection(error):
                text = f"{type(error).__name__}: {error}"
                os.write(writer, (json.dumps({"failed": text[:2000], "rank": rank}) + "\n").encode())
        finally:
            os._exit(status)

    def someone_died(self) -> bool:
        """Whether a rank is gone; it still has to be waited for."""
        options = os.WEXITED | os.WNOHANG | os.WNOWAIT
        return any(os.waitid(os.P_PID, pid, options) is not None for pid in self.pids)

    def messages(self, seconds: float) -> Iterator[dict[str, Any]]:
        """What is said within a time, until every rank is gone."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            if not select.select([self._reader], [], [], left)[0]:
                return
            data = os.read(self._reader, 1 << 16)
            if not data:
                return
            *lines, self._rest = (self._rest + data).split(b"\n")
            yield from map(json.loads, lines)

    def kill(self, order: list[int], stagger: float) -> None:
        """SIGKILL to every rank, in an order."""
        for number, rank in enumerate(order):
            if number:
                time.sleep(stagger)
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pids[rank], signal.SIGKILL)

    def wait(self) -> list[int]:
        """Collect the ranks; their exit statuses, negative for a signal."""
        return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in self.pids]

    def close(self) -> list[dict[str, Any]]:
        """What was still said; the pipe is closed."""
        said = list(self.messages(1.0))
        os.close(self._reader)
        return said
