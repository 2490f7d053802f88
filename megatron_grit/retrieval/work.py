"""How the processes of a job share the blocks of a stage, with one progress bar for all of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tqdm import tqdm

from megatron_grit.data.block_files import Arrays, Block, BlockFolder, shares
from megatron_grit.errors import DataError
from megatron_grit.parallel.logs import get_logger

log = get_logger(__name__)


@dataclass(frozen=True)
class Worker:
    """This process among those that build a database.

    Args:
        rank: of 0 to ``world_size - 1``.
        world_size: processes.
        barrier: returns when every process has called it; does nothing in one alone.
    """

    rank: int = 0
    world_size: int = 1
    barrier: Callable[[], None] = lambda: None

    @property
    def is_first(self) -> bool:
        """Whether this process does what is done once."""
        return self.rank == 0


@contextmanager
def worker() -> Iterator[Worker]:
    """This process, under torchrun or srun one of several. Stages that need no model import no torch where it is
    alone."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        yield Worker()
        return
    import torch.distributed as dist

    from megatron_grit.config.schema import ParallelConfig
    from megatron_grit.parallel.launch import parallel_job

    # A stage may take hours in one process while the others wait for it.
    with parallel_job(ParallelConfig(device="cpu", timeout_minutes=7 * 24 * 60), seed=0) as context:
        yield Worker(context.rank, context.world_size, dist.barrier)


def compute_blocks(
    folder: BlockFolder, compute: Callable[[Block], Arrays], worker: Worker, what: str, unit: str = "chunk"
) -> int:
    """Compute the blocks that are missing or damaged, each by one process, and wait until all are there.

    Args:
        folder: where they are.
        compute: a block's arrays; the same whichever process calls it.
        worker: this process.
        what: for the progress bar.
        unit: what a block has many of.

    Returns:
        Blocks that were computed, by all processes.

    Raises:
        DataError: a block is still missing afterwards: the process that should have made it has failed.
    """
    if worker.is_first:
        folder.clear_leftovers()
    worker.barrier()
    missing = folder.missing()
    worker.barrier()  # no process looks for missing blocks while another one writes
    mine = list(shares(missing, worker.rank, worker.world_size))
    done = folder.num_items - sum(len(block) for block in missing)
    if worker.is_first and 0 < done < folder.num_items:
        log.info(f"{what}: {done:,} of {folder.num_items:,} {unit}s are there already")
    with tqdm(
        total=sum(len(block) for block in mine), unit=unit, unit_scale=True, desc=what, disable=not worker.is_first
    ) as bar:
        for block in mine:
            folder.write(block, compute(block))
            bar.update(len(block))
    worker.barrier()
    for block in folder.blocks:
        if not block.path.is_file():
            raise DataError("was not written by the process that was to; run the same command again", path=block.path)
    return len(missing)
