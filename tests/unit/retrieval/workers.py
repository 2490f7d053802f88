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
    barrier = threading.Barrier(num_workers, timeout=60)
    values: list[Any] = [None] * num_workers

    def gather_of(rank: int) -> Callable[[Any], list[Any]]:
        def gather(value: Any) -> list[Any]:
            values[rank] = value if isinstance(value, np.ndarray) else json.loads(json.dumps(value))
            barrier.wait()
            everything = list(values)
            barrier.wait()
            return everything

        return gather

    def exchange_of(rank: int) -> Callable[[list[np.ndarray]], list[np.ndarray]]:
        def exchange(arrays: list[np.ndarray]) -> list[np.ndarray]:
            values[rank] = arrays
            barrier.wait()
            received = [sent[rank] for sent in values]
            barrier.wait()
            return received

        return exchange

    workers = [
        Worker(
            rank, num_workers, gather_of(rank), gather_of(rank), exchange_of(rank), group=rank, num_groups=num_workers
        )
        for rank in range(num_workers)
    ]
    with ThreadPoolExecutor(num_workers) as pool:
        list(pool.map(task, workers))
