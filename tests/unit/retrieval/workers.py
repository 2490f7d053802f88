"""Several processes of a database build, in the threads of one."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from megatron_grit.retrieval.work import Worker


def run_together(num_workers: int, task: Callable[[Worker], None]) -> None:
    """Call a function once for each of several workers that wait for each other. What they exchange is arrays, or goes
    through JSON, as between processes."""
    barrier, values = threading.Barrier(num_workers, timeout=60), [None] * num_workers

    def gather_of(rank: int) -> Callable[[Any], list[Any]]:
        def gather(value: Any) -> list[Any]:
            values[rank] = value if isinstance(value, np.ndarray) else json.loads(json.dumps(value))
            barrier.wait()
            everything = list(values)
            barrier.wait()
            return everything

        return gather

    workers = [
        Worker(rank, num_workers, gather_of(rank), gather_of(rank), group=rank, num_groups=num_workers)
        for rank in range(num_workers)
    ]
    with ThreadPoolExecutor(num_workers) as pool:
        list(pool.map(task, workers))
