"""Checkpoints are whole or not there, and what is written is the state of the step they are named after."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megatron_grit import compat
from megatron_grit.errors import CheckpointError, OutputError
from megatron_grit.parallel.context import ParallelContext
from megatron_grit.parallel.launch import parallel_job
from megatron_grit.store.lock import locked_folder
from megatron_grit.training import checkpoint_save
from megatron_grit.training.checkpoint import list_checkpoints
from megatron_grit.training.checkpoint_save import clear_leftovers
from megatron_grit.training.sharded_write import ShardedWrite
from megatron_grit.training.trainer import Trainer, train
from tests.corpus import tiny_run

STEPS = 4


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("corpus")
    tiny_run(directory)
    return directory


def make_trainer(corpus: Path, output: Path, context: ParallelContext, **checkpoint: Any) -> Trainer:
    config = tiny_run(corpus)
    config.output_dir, config.training.steps = str(output), STEPS
    config.model.hidden_dropout = 0.1
    for name, value in ({"save_interval": 1, "keep": 0} | checkpoint).items():
        setattr(config.checkpoint, name, value)
    return Trainer(config, context)


def test_a_second_run_in_its_output_dir_is_refused(corpus: Path, tmp_path: Path) -> None:
    """It would remove what the first one is writing, and its metrics."""
    written = tmp_path / "run" / "checkpoints" / "step_00000001.partial" / "state.json"
    written.parent.mkdir(parents=True)
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1}\n')
    written.touch()
    config = tiny_run(corpus)
    config.output_dir = str(tmp_path / "sub" / ".." / "run")
    (tmp_path / "sub").mkdir()
    holder = rf"another process is writing it \(process {os.getpid()} on \S+\); wait for it or end it"
    with locked_folder(tmp_path / "run"), pytest.raises(OutputError, match=holder):
        train(config)
    assert written.exists() and (tmp_path / "run" / "metrics.jsonl").read_text()


class Gate:
    """Writers of files wait until it is opened."""

    def __init__(self) -> None:
        self.opened, self.waiting = threading.Event(), threading.Event()
        self._write = compat.write_sharded_file

    def write(self, *arguments: Any) -> list[Any]:
        self.waiting.set()
        assert self.opened.wait(60)
        return self._write(*arguments)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate()
    monkeypatch.setattr(compat, "write_sharded_file", gate.write)
    yield gate
    gate.opened.set()


def tensors_of(step: Path) -> dict[str, Any]:
    """What the manifest says of the files that hold tensors. The engine's .metadata names its own folder."""
    files = json.loads((step / "manifest.json").read_text())["files"]
    return {name: entry for name, entry in files.items() if name.endswith((".distcp", ".safetensors", "common.pt"))}


def train_past_a_closed_gate(trainer: Trainer, gate: Gate) -> None:
    """A save at step 2 whose files are written after step 4 changed the weights."""
    for batch in trainer.loader.iterate(0, STEPS):
        trainer.step(batch)
        if batch.step == 1:
            trainer.save(2, wait=False)
            assert gate.waiting.wait(60)
    trainer.saver.poll()
    assert not list_checkpoints(trainer.config.output_dir), "visible before it is written"
    gate.opened.set()
    trainer.saver.finish()


@pytest.fixture(scope="module")
def written_in_turn(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that waits for each of its checkpoints."""
    output = tmp_path_factory.mktemp("in_turn")
    with parallel_job(tiny_run(corpus).parallel, 42) as context:
        trainer = make_trainer(corpus, output, context, asynchronous=False)
        for batch in trainer.loader.iterate(0, STEPS):
            trainer.step(batch)
            trainer.save(batch.step + 1, wait=False)
    return output


def test_what_is_written_beside_training_is_the_state_before_it(
    corpus: Path, tmp_path: Path, gate: Gate, written_in_turn: Path
) -> None:
    with parallel_job(tiny_run(corpus).parallel, 42) as context:
        train_past_a_closed_gate(make_trainer(corpus, tmp_path, context), gate)
    (step,) = list_checkpoints(tmp_path)
    files = tensors_of(step)
    assert (
        files == tensors_of(written_in_turn / "checkpoints" / step.name) and len(files) >= 3
    )  # one file a rank on newer engines
    assert files != tensors_of(written_in_turn / "checkpoints" / f"step_{STEPS:08d}")


def test_memory_that_training_changes_is_copied(tmp_path: Path, context: ParallelContext) -> None:
    """The engine takes a tensor on the CPU as it is where it has its memory to itself."""
    for name, is_live in {"live": True, "not": False}.items():
        weight = torch.ones(3)
        (tmp_path / name).mkdir()
        state = {"weight": ShardedTensor.from_rank_offsets("weight", weight)}
        write = ShardedWrite(state, tmp_path / name, live=[weight] if is_live else [])
        weight += 1
        write.write()
        write.close()
        loaded = dist_checkpointing.load_plain_tensors(str(tmp_path / name))["weight"]
        assert torch.equal(loaded, torch.full((3,), 1.0 if is_live else 2.0))


def test_one_at_a_time_and_files_beside_follow(corpus: Path, tmp_path: Path, gate: Gate) -> None:
    with parallel_job(tiny_run(corpus).parallel, 42) as context:
        trainer = make_trainer(corpus, tmp_path, context, keep=1)
        trainer.step(trainer.loader.batch(0))
        trainer.save(1, wait=False)
        assert gate.waiting.wait(60)
        second = threading.Timer(0.3, gate.opened.set)
        second.start()
        trainer.save(2, wait=False)  # waits for the first
        assert [path.name for path in list_checkpoints(tmp_path)] == ["step_00000001"]
        counts = (tmp_path / "blend_counts.json").read_text()
        trainer.saver.finish()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000002"]
    assert (tmp_path / "blend_counts.json").read_text() != counts


def test_the_end_of_a_run_waits(corpus: Path, tmp_path: Path) -> None:
    with parallel_job(tiny_run(corpus).parallel, 42) as context:
        make_trainer(corpus, tmp_path, context, save_interval=3).run()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_00000003", f"step_{STEPS:08d}"]
    assert not [thread for thread in threading.enumerate() if thread.name == "grit-checkpoint"]


def test_an_exception_finishes_what_was_begun(corpus: Path, tmp_path: Path, gate: Gate) -> None:
    with parallel_job(tiny_run(corpus).parallel, 42) as context:
        trainer = make_trainer(corpus, tmp_path, context)

        def fail_later(batch: Any, seconds: float) -> None:
            if batch.step == 1:
                gate.opened.set()
                raise RuntimeError("the second step")

        trainer.report.after_step = fail_later  # type: ignore[method-assign]
        with pytest.raises(RuntimeError, match="the second step"):
            trainer.run()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_00000001"]


def test_an_exception_of_one_rank_waits_for_nobody_for_long(
    corpus: Path, tmp_path: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(checkpoint_save, "_SECONDS_FOR_OTHERS", 0.2)
    arrive = checkpoint_save.all_ranks_arrive
    with parallel_job(tiny_run(corpus).parallel, 42) as context:
        trainer = make_trainer(corpus, tmp_path, context)
        trainer.save(0, wait=False)
        two = type("Two", (), {"rank": 0, "world_size": 2})()
        monkeypatch.setattr(checkpoint_save, "all_ranks_arrive", lambda name, _, seconds: arrive(name, two, seconds))
        trainer.saver.finish_after_error()
    assert "another rank does not answer" in caplog.text
    assert not list_checkpoints(tmp_path)


@pytest.mark.parametrize("wait", [True, False])
@pytest.mark.parametrize("name", ["weights/__0_0.distcp", "random/rank_00000.safetensors", "state.json"])
def test_a_file_that_cannot_be_written_is_named(corpus: Path, tmp_path: Path, name: str, wait: bool) -> None:
    with parallel_job(tiny_run(corpus).parallel, 42) as context:
        trainer = make_trainer(corpus, tmp_path, context)
        trainer.step(trainer.loader.batch(0))
        make_folders = trainer.saver._make_folders

        def block(folder: Path, with_optimizer: bool) -> None:
            make_folders(folder, with_optimizer)
            (folder / name).mkdir()

        trainer.saver._make_folders = block  # type: ignore[method-assign]
        with pytest.raises(CheckpointError, match=f"{name}: cannot be written .*start the same command again"):
            trainer.save(1, wait=wait)
            trainer.saver.finish()
        assert not list_checkpoints(tmp_path)
        trainer.saver._make_folders = make_folders  # type: ignore[method-assign]
        trainer.save(1, wait=True)  # what is left of the first does not matter
    assert len(list_checkpoints(tmp_path)) == 1


def test_no_process_is_started(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer of its own would outlive a killed run and write into the next one's files."""
    import multiprocessing.process
    import os

    def refuse(*_: Any) -> None:
        raise AssertionError("a process is started")

    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", refuse)
    monkeypatch.setattr(os, "fork", refuse)
    with parallel_job(tiny_run(corpus).parallel, 42) as context:
        trainer = make_trainer(corpus, tmp_path, context)
        trainer.save(0, wait=True)
    assert len(list_checkpoints(tmp_path)) == 1


def clear_and_list(folder: Path, context: ParallelContext) -> list[str]:
    clear_leftovers(folder, context)
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_leftovers_are_cleared(tmp_path: Path, context: ParallelContext) -> None:
    def make(name: str) -> Path:
        path = tmp_path / "checkpoints" / name
        path.mkdir(parents=True)
        (path / "state.json").write_text("{}")
        return path

    make("step_00000001")
    make("step_00000002.partial")
    make("step_00000001.replaced")
    make("step_00000000.removed")
    (tmp_path / ".blend_counts.json.12.ab.tmp").write_text("")
    assert clear_and_list(tmp_path, context) == ["step_00000001"]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]
    # Killed between the two renames: the old one stands under its other name, is found there, and gets its own back.
    shutil.move(tmp_path / "checkpoints/step_00000001", tmp_path / "checkpoints/step_00000001.replaced")
    make("step_00000000")
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_00000000", "step_00000001.replaced"]
    assert clear_and_list(tmp_path, context) == ["step_00000000", "step_00000001"]


def broken_adam(trainer: Trainer) -> None:
    for part in trainer.optimizer.chained_optimizers:
        (_, first), *_ = part.optimizer.state.items()
        first["step"] += 1


def shared_adam(trainer: Trainer) -> None:
    for part in trainer.optimizer.chained_optimizers:
        for state in part.optimizer.state.values():
            state["step"] = next(iter(part.optimizer.state.values()))["step"]


def drawn_random(trainer: Trainer) -> None:
    torch.rand(1)


def other_seed(trainer: Trainer) -> None:
    trainer.config.training.seed += 1
    trainer.loader = type(trainer.loader)(trainer.config, trainer.tokenizer)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (broken_adam, "Adam is at step 3, 2 was saved"),
        (shared_adam, "parameters share one step count"),
        (drawn_random, "random state cpu was not restored"),
        (other_seed, "step 3 would train on other records"),
        (None, None),
    ],
)
def test_a_broken_restore_does_not_go_on(
    corpus: Path,
    tmp_path: Path,
    written_in_turn: Path,
    spoil: Callable[[Trainer], None] | None,
    message: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from megatron_grit.training import checkpoint

    shutil.copytree(written_in_turn / "checkpoints/step_00000002", tmp_path / "checkpoints/step_00000002")
    with parallel_job(tiny_run(corpus).parallel, 42) as context:
        trainer = make_trainer(corpus, tmp_path, context)
        if spoil in (broken_adam, shared_adam):
            monkeypatch.setattr(checkpoint, "_separate_adam_steps", lambda part: spoil and spoil(trainer))
        elif spoil is not None:
            restore = trainer._restore
            trainer._restore = lambda: (restore(), spoil(trainer))[0]  # type: ignore[method-assign]
        if message is None:
            trainer.run()
            return
        with pytest.raises(CheckpointError, match=message):
            trainer.run()
        if spoil is other_seed:
            trainer.config.checkpoint.same_data = False
            trainer.run()


def test_what_was_just_written_is_kept(corpus: Path, tmp_path: Path) -> None:
    """A run that starts afresh where a longer one was: its steps are not the newest by number."""
    with parallel_job(tiny_run(corpus).parallel, 1) as context:
        trainer = make_trainer(corpus, tmp_path, context, keep=1)
        trainer.step(trainer.loader.batch(0))
        trainer.save(7, wait=True)
        trainer.save(2, wait=True)
        assert [path.name for path in list_checkpoints(tmp_path)] == ["step_00000002", "step_00000007"]
        trainer.save(8, wait=True)
        assert [path.name for path in list_checkpoints(tmp_path)] == ["step_00000008"]
