"""One sharded state dict on its way to disk: planned by all ranks together, written by each alone, closed by all.

Planning and closing are the engine's. Between them each rank writes its files by itself, in whatever thread, so
training can go on. No process is started for it: a process would outlive a run that is killed, and go on to write into
a directory that the next run has begun to use; and a fork of a process with the threads of gloo, CUDA and OpenMP has
their locks in whatever state they were.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_grit import compat
from megatron_grit.errors import CheckpointError


class ShardedWrite:
    """Plan the writing of a state dict. Collective over all ranks, as is :meth:`close`.

    Args:
        state: sharded state dict.
        folder: an empty directory.
        live: tensors that training changes in place; what of them is in the state is copied now, so that the state of
            now is written whatever training does next. Empty: nothing changes before :meth:`write` is done.
    """

    def __init__(self, state: dict[str, Any], folder: Path, *, live: Iterable[Tensor] = ()) -> None:
        self._request = compat.plan_sharded_save(state, folder)
        self._buckets = self._stage(live) if self._request.async_fn is not None else []
        self._results: dict[int, list[Any]] = {}

    def _stage(self, live: Iterable[Tensor]) -> list[Any]:
        """Buckets with all tensors on the CPU.

        The engine copies what comes from a device and what is part of a larger buffer, as weights and optimizer states
        are as a rule. A tensor on the CPU that has its memory to itself it takes as it is.
        """
        changing = {tensor.untyped_storage().data_ptr() for tensor in live}
        buckets = []
        for path, key, (texts, tensors) in self._request.preload_fn():
            own = [
                (item, tensor.clone() if tensor.untyped_storage().data_ptr() in changing else tensor)
                for item, tensor in tensors
            ]
            buckets.append((path, key, (texts, own)))
        return buckets

    @property
    def paths(self) -> list[Path]:
        """Files that this rank writes in :meth:`write`."""
        return [Path(path) for path, _, _ in self._buckets]

    def write(self) -> None:
        """Write this rank's files and flush them to disk. Not collective; any thread.

        Raises:
            CheckpointError: names the file that cannot be written.
        """
        for number, bucket in enumerate(self._buckets):
            try:
                self._results[number] = compat.write_sharded_file(self._request, bucket, number)
            except (OSError, RuntimeError) as error:
                raise write_error(Path(bucket[0]), error) from error
            self._buckets[number] = (*bucket[:2], ([], []))  # the copy is not needed any more

    def close(self) -> None:
        """Write what describes all ranks' files, once all of them are written. Collective over all ranks."""
        if self._request.async_fn is not None:
            # One queue for all writers of the engine: what is put in is taken out below, in the same thread.
            self._request.async_fn_args[2].put(self._results)
        for finalize in self._request.finalize_fns:
            finalize()


def write_error(path: Path, error: BaseException) -> CheckpointError:
    """What to say of a file that could not be written."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).splitlines()[0]
    return CheckpointError(
        f"{path}: cannot be written ({reason}); the checkpoints before it are whole: make room and start the same "
        "command again"
    )
