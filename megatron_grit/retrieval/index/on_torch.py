"""The nearest of many centres by matrix products of torch, on the CPU or on a GPU.

On the CPU torch's are those that its build has for this processor; what faiss brings along may take several times as
long. No GPU has run this file yet.
"""

from __future__ import annotations

import numpy as np

from megatron_grit.retrieval.index.threads import ROWS_OF_PART
from megatron_grit.store.environment import local_rank

_CENTRES, _CENTRES_ON_GPU = 1 << 11, 1 << 17
"""That a part of the rows is compared with at a time: 32 MiB of products, 2 GiB on a GPU."""


def device_of_process() -> str:
    """The GPU of this process by torch, or the CPU."""
    import torch

    return f"cuda:{local_rank() % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"


def nearest_by_torch(
    vectors_ND: np.ndarray, centres_KD: np.ndarray, metric: str, device: str
) -> tuple[np.ndarray, np.ndarray]:
    """Scores, float32 [N], distances or products, and numbers, int64 [N], of the nearest centres. Of equally near ones
    the first. Parts of :data:`ROWS_OF_PART` rows are compared by themselves."""
    import torch

    centres = torch.from_numpy(np.ascontiguousarray(centres_KD, np.float32)).to(device)
    # The nearest by distance has the largest product, less half of its own square: one channel more.
    halves = (centres.double() ** 2).sum(1, keepdim=True).float() / -2
    longer = torch.cat([centres, halves if metric == "l2" else torch.zeros_like(halves)], dim=1)
    at_a_time = _CENTRES if device == "cpu" else _CENTRES_ON_GPU
    scores, numbers = np.empty(len(vectors_ND), np.float32), np.empty(len(vectors_ND), np.int64)
    for start in range(0, len(vectors_ND), ROWS_OF_PART):
        rows = torch.from_numpy(np.ascontiguousarray(vectors_ND[start : start + ROWS_OF_PART], np.float32)).to(device)
        with_one = torch.cat([rows, torch.ones_like(rows[:, :1])], dim=1)
        best = torch.full((len(rows),), -torch.inf, device=device)
        of = torch.zeros(len(rows), dtype=torch.int64, device=device)
        for first in range(0, len(centres), at_a_time):
            found, at = (with_one @ longer[first : first + at_a_time].T).max(dim=1)
            is_better = found > best
            best, of = torch.where(is_better, found, best), torch.where(is_better, at + first, of)
        if metric == "l2":
            best = ((rows.double() - centres[of].double()) ** 2).sum(1).float()
        scores[start : start + len(rows)], numbers[start : start + len(rows)] = best.cpu(), of.cpu()
    return scores, numbers
