"""How the processes of a job share the blocks of a stage, and show how far all of them are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, TypeVar

import numpy as np

from megatron_grit.errors import DataError
from megatron_grit.inference.encoders.protocol import Embedder
from megatron_grit.store.blocks import Arrays, Block, BlockFolder, shares
from megatron_grit.store.environment import check_job, job_size, local_rank
from megatron_grit.store.lock import locked_folder
from megatron_grit.store.logs import get_logger
from megatron_grit.store.progress import Progress

log = get_logger(__name__)

MINUTES = 7 * 24 * 60
"""That processes wait for each other: one of them may train an index for days."""
T = TypeVar("T")


def _alone(value: T) -> list[T]:
    return [value]


@dataclass(frozen=True)
class Worker:
    """This process among those that build a database.

    Args:
        rank: of 0 to ``world_size - 1``.
        world_size: processes.
        gather: every process's value, of what JSON can hold, on every process, in the order of ranks.
        gather_arrays: every process's array, in the order of ranks; all of one type and number of axes, of any length.
        exchange: given an array for each process, in the order of ranks, the arrays that they have for this one; arrays
            of one axis and one type.
        group: several processes may hold one embedder together; number of this process's model-parallel group.
        num_groups: model-parallel groups of the job; they share the blocks.
        leads: whether this process writes what its group computes.
    """

    rank: int = 0
    world_size: int = 1
    gather: Callable[[Any], list[Any]] = _alone
    gather_arrays: Callable[[np.ndarray], list[np.ndarray]] = _alone
    exchange: Callable[[list[np.ndarray]], list[np.ndarray]] = list
    group: int = 0
    num_groups: int = 1
    leads: bool = True

    @property
    def is_first(self) -> bool:
        """Whether this process does what is done once."""
        return self.rank == 0

    def in_group_of(self, embedder: Embedder | None) -> Worker:
        """This process for a stage that embeds: model-parallel groups share the blocks, and one process
        of each writes them."""
        group = None if embedder is None else embedder.model_group
        if group is None:
            return self
        return replace(self, group=group.number, num_groups=group.num_groups, leads=group.leads)

    def barrier(self) -> None:
        """Return when every process has called it."""
        self.gather(None)

    def from_first(self, compute: Callable[[], T]) -> T:
        """What the first process computes, on every process: something that JSON can hold."""
        value: T = self.gather(compute() if self.is_first else None)[0]
        return value


@contextmanager
def worker() -> Iterator[Worker]:
    """This process, under torchrun or srun one of several. Alone it imports no torch.

    When one process fails the others end as well, within seconds, and one of them says why.

    Raises:
        JobError: another process failed.
    """
    check_job(meets=False)
    if job_size() == 1:
        yield Worker()
        return
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    from megatron_grit.parallel.collectives import gather_json
    from megatron_grit.parallel.rendezvous import join_job
    from megatron_grit.parallel.watch import JobWatch

    owns_process_group = not dist.is_initialized()
    if owns_process_group:
        check_job()
        has_gpu = torch.cuda.is_available()
        if has_gpu:
            torch.cuda.set_device(local_rank())
        store, rank, world_size = join_job(timedelta(minutes=10))
        # Processes wait for each other on the CPU: they would keep a GPU busy with waiting.
        dist.init_process_group(
            backend="cpu:gloo,cuda:nccl" if has_gpu else "gloo",
            timeout=timedelta(minutes=MINUTES),
            store=store,
            rank=rank,
            world_size=world_size,
        )
    place: Any = SimpleNamespace(rank=dist.get_rank(), world_size=dist.get_world_size(), device=torch.device("cpu"))
    try:
        with JobWatch(place, MINUTES):
            yield Worker(
                place.rank,
                place.world_size,
                lambda value: gather_json(value, place),
                lambda array: _gather_arrays(array, place.world_size),
                _exchange,
                group=place.rank,
                num_groups=place.world_size,
            )
    finally:
        if owns_process_group and dist.is_initialized():
            dist.destroy_process_group()


@contextmanager
def alone_in(folder: Path, worker: Worker) -> Iterator[None]:
    """Hold the lock of a folder: two commands at a time would remove each other's files. All processes call it.

    Raises:
        OutputError: another command holds it, or the folder cannot be made.
    """
    if not worker.is_first:
        yield
        return
    with locked_folder(folder):
        yield


def _gather_arrays(array: np.ndarray, world_size: int) -> list[np.ndarray]:
    """Every process's array, along its first axis of any length, on every process."""
    import torch
    import torch.distributed as dist

    content = torch.from_numpy(np.ascontiguousarray(array))
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(world_size)]
    dist.all_gather(lengths, torch.tensor([len(content)]))
    longest = max(int(length) for length in lengths)
    padded = content.new_zeros(longest, *content.shape[1:])
    padded[: len(content)] = content
    parts = [torch.empty_like(padded) for _ in range(world_size)]
    dist.all_gather(parts, padded)
    return [part[: int(length)].numpy() for part, length in zip(parts, lengths, strict=True)]


def _exchange(arrays: list[np.ndarray]) -> list[np.ndarray]:
    """What each process has for this one."""
    import torch
    import torch.distributed as dist

    lengths = torch.tensor([len(array) for array in arrays])
    incoming = torch.empty_like(lengths)
    dist.all_to_all_single(incoming, lengths)
    content = torch.from_numpy(np.concatenate(arrays))
    received = content.new_empty(int(incoming.sum()))
    dist.all_to_all_single(received, content, incoming.tolist(), lengths.tolist())
    return [part.numpy() for part in received.split(incoming.tolist())]


class Check(NamedTuple):
    """Blocks that are computed again and compared."""

    what: str
    folder: BlockFolder
    compute: Callable[[Block], Arrays]
    """Makes a block again."""
    during: AbstractContextManager[None] = nullcontext()
    """As of :func:`compute_blocks`."""


def compute_blocks(
    folder: BlockFolder,
    compute: Callable[[Block], Arrays],
    worker: Worker,
    what: str,
    unit: str = "chunk",
    during: AbstractContextManager[None] | None = None,
) -> int:
    """Compute the blocks that are missing or damaged, each by one process, and wait until all are there.

    Args:
        folder: where they are.
        compute: a block's arrays; the same whichever model-parallel group calls it. All processes of the group do.
        worker: this process.
        what: for the progress, which is that of the first process and counts for all.
        unit: what a block has many of.
        during: entered while this process computes its blocks, be they none; what all processes do together in
            ``compute`` ends with it.

    Returns:
        Blocks that were computed, by all processes.

    Raises:
        DataError: a block is still missing afterwards: a process cannot see what another one writes.
    """
    if worker.is_first:
        folder.clear_leftovers()
    worker.barrier()
    # Looking for damage reads every block: that, too, is shared.
    looked_at = [block.number for block in shares(folder.blocks, worker.rank, worker.world_size)]
    bad = [number for number in looked_at if folder.problem(folder.blocks[number]) is not None]
    numbers = sorted(number for part in worker.gather(bad) for number in part)
    missing = [folder.blocks[number] for number in numbers]
    to_do = sum(len(block) for block in missing)
    if worker.is_first and 0 < to_do < folder.num_items:
        log.info(f"{what}: {folder.num_items - to_do:,} of {folder.num_items:,} {unit}s are there already")
    bar = Progress(to_do, what, unit, enabled=worker.is_first and to_do > 0)
    with bar, during or nullcontext():
        for place, block in enumerate(shares(missing, worker.group, worker.num_groups)):
            arrays = compute(block)
            if worker.leads:
                folder.write(block, arrays)
            # The others are about as far.
            bar.update(sum(len(other) for other in missing[place * worker.num_groups :][: worker.num_groups]))
    worker.barrier()
    unseen = [block for block in missing if not block.path.is_file()]
    if unseen:
        raise DataError(
            "was written by another process and is not seen by this one; is the project directory on a file system "
            "that all nodes share?",
            path=unseen[0].path,
        )
    return len(missing)
