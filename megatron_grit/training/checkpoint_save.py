"""Writing checkpoints, beside training or while it waits.

A checkpoint is written under a temporary name by all ranks, each its own files, and takes its real name when every rank
is done, so it is whole or not there. With ``checkpoint.asynchronous`` training only waits for a copy of the state in
the host's memory; a thread writes, flushes and hashes it while the next steps run. One checkpoint at a time.
"""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from megatron_grit import compat
from megatron_grit.config.checkpoint_folder import REPLACED, best_checkpoint, started_from
from megatron_grit.config.commands import command_line
from megatron_grit.config.parse import save_config
from megatron_grit.config.schema import RunConfig
from megatron_grit.data.chat.chat import Chat, write_chat
from megatron_grit.data.chat.run_chat import run_chat
from megatron_grit.data.rows.loader import GritDataLoader
from megatron_grit.data.text.tokenizer import Tokenizer, copy_tokenizer
from megatron_grit.errors import CheckpointError, GritError
from megatron_grit.parallel.collectives import all_ranks_arrive, any_rank, gather_json
from megatron_grit.parallel.context import ParallelContext
from megatron_grit.parallel.random import RandomState
from megatron_grit.store.files import sync_folder
from megatron_grit.store.logs import get_logger
from megatron_grit.training.checkpoint import (
    FORMAT_VERSION,
    Stage,
    checkpoint_path,
    layout_of,
    list_checkpoints,
    optimizer_state,
    random_file,
    saved_state,
)
from megatron_grit.training.manifest import write_manifest, write_part
from megatron_grit.training.restore_checks import optimizer_parts, optimizer_step
from megatron_grit.training.sharded_write import ShardedWrite, write_error

_PARTIAL, _REMOVED = ".partial", ".removed"
_SECONDS_FOR_OTHERS = 5.0

log = get_logger(__name__)


@dataclass(kw_only=True)
class _Pending:
    """A checkpoint on its way to disk."""

    step: int
    folder: Path
    """Where it is written."""
    final: Path
    """Where it will be."""
    writes: list[ShardedWrite]
    state: dict[str, Any]
    """What state.json will hold."""
    random: dict[str, Tensor] | None
    thread: threading.Thread | None = None
    error: CheckpointError | None = None
    mine: list[Path] = field(default_factory=list)
    """Files that this rank wrote."""


class CheckpointSaver:
    """Saves the checkpoints of a run. All methods are collective over all ranks.

    Args:
        config: the resolved configuration.
        context: this process's place in the mesh.
        tokenizer: copied beside the weights.
        loader: says in state.json which records come next; asked on rank 0, in the thread that writes.
        chat: how the model converses. None: as a run of this configuration learns it.
        on_saved: told the step and directory of a checkpoint, on every rank, as soon as it is whole.
    """

    def __init__(
        self,
        config: RunConfig,
        context: ParallelContext,
        tokenizer: Tokenizer,
        loader: GritDataLoader | None = None,
        on_saved: Callable[[int, Path], None] | None = None,
        chat: Chat | None = None,
    ) -> None:
        self._config, self._context, self._tokenizer = config, context, tokenizer
        self._loader, self._on_saved = loader, on_saved
        self._chat = chat or run_chat(config, tokenizer, started_from(config))
        self._pending: _Pending | None = None
        self.base: dict[str, Any] | None = None
        """The base of a run with adapters, for state.json."""
        self.teacher: str | None = None
        """Fingerprint of the weights of ``loss.teacher.model``, for state.json."""
        self.evaluation: dict[str, Any] | None = None
        """What evaluations of the run have said so far, for state.json."""
        self.objectives: dict[str, Any] = {}
        """What objectives keep for a resumed run, by kind, for state.json."""

    def save(self, model: Stage, optimizer: Any | None, step: int, *, wait: bool) -> None:
        """Save the state of now. One that is still being written is finished first.

        Args:
            model: this process's stage, or its chunks, unwrapped.
            optimizer: the engine's optimizer. None: save weights only.
            step: steps that were trained.
            wait: return when the checkpoint is whole, whatever the configuration says.

        Raises:
            CheckpointError: a file cannot be written; names it.
        """
        self.finish()
        wait = wait or not self._config.checkpoint.asynchronous
        final = checkpoint_path(self._config.output_dir, step)
        folder = final.with_name(final.name + _PARTIAL)
        self._make_folders(folder, optimizer is not None)
        live = [] if wait else _live_tensors(model, optimizer)
        with _naming(folder):
            writes = [ShardedWrite(saved_state(model, self._context), folder / "weights", live=live)]
            if optimizer is not None:
                state = optimizer_state(optimizer, model, self._context, is_loading=False)
                writes.append(ShardedWrite(state, folder / "optimizer", live=live))
        random = None if optimizer is None else RandomState.capture().as_tensors()
        described = describe_checkpoint(self._config, self._context, self._tokenizer, step)
        if optimizer is not None:  # a stage that has nothing to train counts no steps
            steps = gather_json(optimizer_step(optimizer), self._context)
            described["optimizer_step"] = max((count for count in steps if count is not None), default=None)
        if self.base is not None:
            described["base"] = self.base
        if self.teacher is not None:
            described["teacher"] = self.teacher
        if self.evaluation is not None:
            described["evaluation"] = self.evaluation
        if self.objectives:
            described["objectives"] = self.objectives
        if (command := command_line()) is not None:
            described["command"] = command
        pending = _Pending(step=step, folder=folder, final=final, writes=writes, state=described, random=random)
        self._pending = pending
        if wait:
            self._write(pending)
            self.finish()
            return
        pending.thread = threading.Thread(target=self._write, args=(pending,), name="grit-checkpoint", daemon=True)
        pending.thread.start()

    def poll(self) -> None:
        """Finish the checkpoint that is being written if every rank has written its part. Costs nothing without one.

        Raises:
            CheckpointError: a file could not be written; names it.
        """
        if self._pending is None or self._pending.thread is None:
            return
        if not any_rank(self._pending.thread.is_alive(), self._context):
            self.finish()

    def finish(self) -> None:
        """Wait for the checkpoint that is being written, if there is one.

        Raises:
            CheckpointError: a file could not be written; names it.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        if pending.thread is not None:
            pending.thread.join()
        self._agree(pending.error, pending.final)
        with _naming(pending.folder):
            for write in pending.writes:
                write.close()
        self._agree(self._publish(pending) if self._context.rank == 0 else None, pending.final)
        if self._on_saved is not None:
            self._on_saved(pending.step, pending.final)
        self._agree(self._remove_old(pending.final) if self._context.rank == 0 else None, pending.final)

    def finish_after_error(self) -> None:
        """As :meth:`finish`, for a run that ends in an exception: where the other ranks do not end too, because they
        hang or are gone, the checkpoint is given up. Raises nothing: the exception that ended the run is the one to
        tell."""
        if self._pending is None:
            return
        name = self._pending.final
        if not all_ranks_arrive(f"finish {name.name}", self._context, _SECONDS_FOR_OTHERS):
            log.error(f"{name} was being written and is given up: another rank does not answer")
            self._pending = None
            return
        try:
            self.finish()
        except Exception as error:  # a broken connection, a full disk: what is told is what ended the run
            log.error(f"{name} was being written and is lost: {error}")

    def _make_folders(self, folder: Path, with_optimizer: bool) -> None:
        problem: CheckpointError | None = None
        if self._context.rank == 0:
            try:
                shutil.rmtree(folder, ignore_errors=True)
                for name in ("weights", "optimizer", "random") if with_optimizer else ("weights",):
                    (folder / name).mkdir(parents=True)
                save_config(self._config, folder / "config.yaml")
                copy_tokenizer(self._tokenizer, folder)
                write_chat(self._chat, folder)
            except OSError as error:
                problem = write_error(Path(error.filename or folder), error)
        self._agree(problem, folder)

    def _write(self, pending: _Pending) -> None:
        """This rank's files, in whatever thread: nothing here is collective or touches what training changes."""
        rank, folder = self._context.rank, pending.folder
        try:
            for write in pending.writes:
                write.write()
                pending.mine += write.paths
            if pending.random is not None:
                file = random_file(folder, rank)
                with _naming(file):
                    file.write_bytes(safetensors.torch.save(pending.random))
                pending.mine.append(file)
            if rank == 0:
                file = folder / "state.json"
                with _naming(file):
                    file.write_text(json.dumps(pending.state | self._next_records(pending.step), indent=1) + "\n")
            with _naming(folder):
                write_part(folder, pending.mine, rank)
        except CheckpointError as error:
            pending.error = error
        except Exception as error:  # told by all ranks, from the thread that trains
            pending.error = write_error(folder, error)

    def _next_records(self, step: int) -> dict[str, Any]:
        if self._loader is None:
            return {}
        found: dict[str, Any] = {}
        # What is wrong with the next step's data is told when it is trained on.
        with suppress(GritError):
            found["next_records"] = self._loader.fingerprint(step)  # opens the version that the step reads
        versions = self._loader.versions_read()
        return found | ({"versions_read": versions} if versions else {})

    def _agree(self, problem: CheckpointError | None, path: Path) -> None:
        if any_rank(problem is not None, self._context):
            raise problem or CheckpointError(f"{path}: cannot be written; another rank says which file")

    def _publish(self, pending: _Pending) -> CheckpointError | None:
        """Give a complete checkpoint its name. On rank 0."""
        final, folder = pending.final, pending.folder
        try:
            write_manifest(folder, self._context.world_size)
            replaced = final.with_name(final.name + REPLACED)
            if final.exists():  # a step that was saved before: two renames, so that one of the two is always there
                shutil.rmtree(replaced, ignore_errors=True)
                final.rename(replaced)
            folder.rename(final)
            sync_folder(final.parent)
            shutil.rmtree(replaced, ignore_errors=True)
        except OSError as error:
            return write_error(Path(error.filename or folder), error)
        return None

    def _remove_old(self, newest: Path) -> CheckpointError | None:
        """Remove what ``checkpoint.keep`` does not keep, but for the best one. On rank 0."""
        output_dir = self._config.output_dir
        try:
            if self._config.checkpoint.keep:
                kept = (
                    newest,
                    best_checkpoint(output_dir),
                )  # the newest: in a directory with later steps of another run
                for path in list_checkpoints(output_dir)[: -self._config.checkpoint.keep]:
                    if path not in kept:
                        _remove(path)
        except OSError as error:
            return write_error(Path(error.filename or newest), error)
        except CheckpointError as error:
            return error
        return None


def describe_checkpoint(config: RunConfig, context: ParallelContext, tokenizer: Tokenizer, step: int) -> dict[str, Any]:
    """What state.json says of a checkpoint of weights."""
    return {
        "format_version": FORMAT_VERSION,
        "step": step,
        "world_size": context.world_size,
        "parallel": layout_of(context),
        "vocab_size": config.model.vocab_size or tokenizer.vocab_size,
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "seed": config.training.seed,
        "optimizer_step": None,
        "versions": compat.installed_versions(),
    }


def save_checkpoint(
    config: RunConfig,
    context: ParallelContext,
    model: Stage,
    optimizer: Any | None,
    tokenizer: Tokenizer,
    step: int,
) -> Path:
    """Write one checkpoint; on return it is complete. Collective over all ranks. Arguments as of CheckpointSaver.

    Raises:
        CheckpointError: a file cannot be written; names it.
    """
    CheckpointSaver(config, context, tokenizer).save(model, optimizer, step, wait=True)
    return checkpoint_path(config.output_dir, step)


def clear_leftovers(output_dir: str | Path, context: ParallelContext) -> None:
    """Remove what a killed run left half written or half deleted, and finish what it was replacing. Collective."""
    if context.rank == 0:
        folder = Path(output_dir) / "checkpoints"
        for path in folder.glob(f"step_*{REPLACED}"):
            final = path.with_name(path.name.removesuffix(REPLACED))
            if final.exists():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.rename(final)
        for path in [*folder.glob(f"step_*{_PARTIAL}"), *folder.glob(f"step_*{_REMOVED}")]:
            shutil.rmtree(path, ignore_errors=True)
        for path in Path(output_dir).glob(".*.tmp"):
            path.unlink(missing_ok=True)
    dist.barrier()


def _live_tensors(model: Stage, optimizer: Any | None) -> list[Tensor]:
    """What the next step changes in place."""
    chunks = model if isinstance(model, Sequence) else [model]
    found = [tensor for chunk in chunks for tensor in [*chunk.parameters(), *chunk.buffers()]]
    for part in [] if optimizer is None else optimizer_parts(optimizer):
        found += [parameter for group in part.optimizer.param_groups for parameter in group["params"]]
        states = part.optimizer.state.values()
        found += [value for state in states for value in state.values() if isinstance(value, Tensor)]
    return found


@contextmanager
def _naming(folder: Path) -> Iterator[None]:
    """Turn what the engine raises where it cannot write into an error that names the file."""
    try:
        yield
    except (OSError, CheckpointException) as error:
        raise write_error(Path(getattr(error, "filename", None) or folder), error) from error


def _remove(path: Path) -> None:
    """Delete a checkpoint, which is never seen half deleted."""
    removed = path.with_name(path.name + _REMOVED)
    shutil.rmtree(removed, ignore_errors=True)
    path.rename(removed)
    shutil.rmtree(removed, ignore_errors=True)
