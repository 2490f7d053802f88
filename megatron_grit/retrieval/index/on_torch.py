"""The nearest of many centres by matrix products of torch, on the CPU or on a GPU.

On the CPU torch's are those that its build has for this processor; what faiss brings along may take several times as
long. No GPU has run this file yet.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np

from megatron_grit.retrieval.index.threads import ROWS_OF_PART
from megatron_grit.store.environment import local_rank

_CENTRES, _CENTRES_ON_GPU = 1 << 9, 1 << 17
"""That a part of the rows is compared with at a time: 8 MiB of products in each thread, 2 GiB on a GPU."""
_ONE_AT_A_TIME = threading.Lock()
"""Torch's number of threads is that of the process."""


def nearest_centres(
    vectors_ND: np.ndarray, centres_KD: np.ndarray, metric: str, device: str | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Scores, float32 [N], distances or products, and numbers, int64 [N], of the nearest centres. Of equally near ones
    the first. Parts of :data:`ROWS_OF_PART` rows are compared by themselves; on the CPU the bits do not depend on the
    number of threads.

    Args:
        vectors_ND: float32.
        centres_KD: float32.
        metric: l2 or inner_product.
        device: torch's. None: the GPU of this process, or the CPU where torch finds none.
    """
    import torch

    if device is None:
        device = f"cuda:{local_rank() % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"
    at_a_time = _CENTRES if device == "cpu" else _CENTRES_ON_GPU
    scores, numbers = np.empty(len(vectors_ND), np.float32), np.empty(len(vectors_ND), np.int64)
    with _single_threads() as pool:
        centres = torch.from_numpy(np.ascontiguousarray(centres_KD, np.float32)).to(device)
        # The nearest by distance has the largest product, less half of its own square: one channel more.
        halves = (centres.double() ** 2).sum(1, keepdim=True).float() / -2
        longer = torch.cat([centres, halves if metric == "l2" else torch.zeros_like(halves)], dim=1)
        for start in range(0, len(vectors_ND), ROWS_OF_PART):
            part = np.ascontiguousarray(vectors_ND[start : start + ROWS_OF_PART], np.float32)
            rows = torch.from_numpy(part).to(device)
            with_one = torch.cat([rows, torch.ones_like(rows[:, :1])], dim=1)

            def compare(first: int, with_one: torch.Tensor = with_one) -> tuple[torch.Tensor, torch.Tensor]:
                found, at = (with_one @ longer[first : first + at_a_time].T).max(dim=1)
                return found, at + first

            best = torch.full((len(rows),), -torch.inf, device=device)
            of = torch.zeros(len(rows), dtype=torch.int64, device=device)
            firsts = range(0, len(centres), at_a_time)
            for found, at in (pool.map if device == "cpu" else map)(compare, firsts):
                is_better = found > best
                best, of = torch.where(is_better, found, best), torch.where(is_better, at, of)
            if metric == "l2":
                best = ((rows.double() - centres[of].double()) ** 2).sum(1).float()
            scores[start : start + len(rows)], numbers[start : start + len(rows)] = best.cpu(), of.cpu()
    return scores, numbers


@contextmanager
def _single_threads() -> Iterator[ThreadPoolExecutor]:
    """As many threads as torch has, each of which computes alone: a product that several share has other last bits for
    each number of them."""
    import torch

    with _ONE_AT_A_TIME:
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with ThreadPoolExecutor(before) as pool:
                yield pool
        finally:
            torch.set_num_threads(before)
