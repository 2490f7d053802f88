"""Run a function on several gloo processes of this machine."""

from __future__ import annotations

import gc
import json
import multiprocessing.connection
import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore

from tests.harness.command import fork_context
from tests.harness.slots import slots

MAX_SECONDS = 600
GRACE_SECONDS = 5


def run_on_ranks(function: Callable[..., Any], world_size: int, directory: Path, *args: Any) -> list[Any]:
    """Call ``function(*args)`` on every rank of a gloo job.

    The process group exists already when the function runs, so it may build several meshes one after another.

    Args:
        function: importable by name; returns what JSON can hold.
        world_size: number of processes.
        directory: for the results.

    Returns:
        What each rank returned. Fails with the first rank's traceback where one raises.
    """
    with slots(world_size):
        return _run(function, world_size, directory, args)


def _run(function: Callable[..., Any], world_size: int, directory: Path, args: Any) -> list[Any]:
    # This process holds the store, so that its port is taken when ranks are told of it.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = fork_context()
    workers = [
        context.Process(target=_worker, args=(function, rank, world_size, store.port, str(directory), args))
        for rank in range(world_size)
    ]
    for worker in workers:
        worker.start()
    deadline = time.monotonic() + MAX_SECONDS
    while any(worker.is_alive() for worker in workers) and time.monotonic() < deadline:
        multiprocessing.connection.wait([worker.sentinel for worker in workers if worker.is_alive()], timeout=1)
        if any(worker.exitcode for worker in workers):
            # The others wait for the one that failed; let those that fail as well write why.
            deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
    hung = [rank for rank, worker in enumerate(workers) if worker.is_alive()]
    for worker in workers:
        worker.kill()
    failures = [path.read_text() for path in sorted(directory.glob("error_*.txt"))]
    assert not failures, "\n".join(failures)
    assert not hung, f"ranks {hung} still ran after {MAX_SECONDS} s"
    crashed = {rank: worker.exitcode for rank, worker in enumerate(workers) if worker.exitcode}
    assert not crashed, f"ranks ended without a word, with these exit statuses: {crashed}"
    return [json.loads((directory / f"result_{rank}.json").read_text()) for rank in range(world_size)]


def _worker(function: Callable[..., Any], rank: int, world_size: int, port: int, directory: str, args: Any) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    gc.freeze()  # each mesh that is taken down is followed by a collection, which need not look at what is imported
    try:
        store = TCPStore("127.0.0.1", port, is_master=False)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
        result = function(*args)
        Path(directory, f"result_{rank}.json").write_text(json.dumps(result))
        dist.barrier()
    except BaseException:
        Path(directory, f"error_{rank}.txt").write_text(f"rank {rank}:\n{traceback.format_exc()}")
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
