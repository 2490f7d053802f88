"""Centres of many lists, by Lloyd's iterations in which processes share the vectors.

As faiss's Clustering does it: random vectors are the first centres; each vector belongs to the nearest centre, each
centre becomes the mean of its own, and one that has none takes half of another's. A process holds a run of the vectors
and adds up the means of a range of the centres.

The result is the same, bit for bit, for any number of processes and of their threads, on one kind of machine. Vectors
are compared in parts of the same rows, whoever compares them; sums are of integers, whose order does not matter. These
are the vectors' channels in fixed point, with so many bits that no sum can overflow: of 2^28 vectors 33 bits below the
largest channel, where float32 has 24.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from megatron_grit.data.order.permutation import derive_keys, permute
from megatron_grit.retrieval.index.threads import ROWS_OF_PART
from megatron_grit.retrieval.work import Worker
from megatron_grit.store.blocks import BlockFolder
from megatron_grit.store.logs import get_logger

log = get_logger(__name__)

SHARED_LISTS = 1 << 14
"""From so many lists on they are trained here, by however many processes; fewer by faiss, in one process."""
POINTS_PER_LIST = 256
"""Vectors that are used at most for each list, as by faiss."""
ITERATIONS = 10
"""As by faiss for lists."""
_SHIFT = 1 / 1024
"""By which the halves of a centre that is cut in two differ from it, to either side, as faiss's."""
_BITS = 62
"""Of a sum."""

Nearest = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
"""Of vectors, float32 [n, D], and centres, float32 [K, D]: the score of the nearest centre, float32 [n], a distance or
a product, and its number, int64 [n]. Part by part of the vectors."""


def share_of(num_vectors: int, worker: Worker) -> tuple[int, int]:
    """The vectors of a process: the first, and the one after the last."""
    parts = -(-num_vectors // ROWS_OF_PART)
    first, last = (ROWS_OF_PART * (rank * parts // worker.world_size) for rank in (worker.rank, worker.rank + 1))
    return min(first, num_vectors), min(last, num_vectors)


@dataclass(frozen=True)
class KMeans:
    """What is clustered, and how.

    Args:
        num_lists: K.
        num_vectors: of all processes.
        spherical: centres are scaled to a length of 1, as for products.
        seed: of the first centres, and of those that are cut in two.
        nearest: compares.
        iterations: of Lloyd.
    """

    num_lists: int
    num_vectors: int
    spherical: bool
    seed: int
    nearest: Nearest
    iterations: int = ITERATIONS

    def run(self, vectors_ND: np.ndarray, worker: Worker, state: BlockFolder) -> np.ndarray:
        """The centres, float32 [K, D]. All processes call it.

        Args:
            vectors_ND: float32, those of this process, as :func:`share_of` says.
            worker: this process.
            state: a block for each iteration; a killed run goes on from the last one.

        Raises:
            OutputError: the disk is full.
        """
        if worker.is_first:
            state.clear_leftovers()
        done = worker.from_first(lambda: self._done(state))
        if done:
            centres = state.read(state.blocks[done - 1])["centres"]
            if worker.is_first:
                log.info(f"training lists: {done} of {self.iterations} iterations are there already")
        else:
            centres = self._first_centres(vectors_ND, worker)
        scale = self._scale(vectors_ND, worker)
        for number in range(done, self.iterations):
            scores, of = self.nearest(vectors_ND, centres)
            # Sums of parts, added exactly: as the same whoever has which parts.
            starts = range(0, len(scores), ROWS_OF_PART)
            sums = [float(scores[start : start + ROWS_OF_PART].sum(dtype=np.float64)) for start in starts]
            objective = math.fsum(each for part in worker.gather(sums) for each in part)
            centres, num_split = self._means(vectors_ND, of, centres, scale, worker, number)
            if worker.is_first:
                log.info(
                    f"training lists: iteration {number + 1} of {self.iterations}, mean "
                    f"{objective / self.num_vectors:.6g}" + (f", {num_split} empty lists" if num_split else "")
                )
                state.write(state.blocks[number], {"centres": centres, "objective": np.array([objective])})
                if number > 1:
                    state.blocks[number - 2].path.unlink(missing_ok=True)
            worker.barrier()
        return centres

    def _done(self, state: BlockFolder) -> int:
        """Iterations of an earlier run."""
        whole = [block.number + 1 for block in reversed(state.blocks) if block.path.is_file()]
        return next((number for number in whole if state.problem(state.blocks[number - 1]) is None), 0)

    def _first_centres(self, vectors_ND: np.ndarray, worker: Worker) -> np.ndarray:
        first, last = share_of(self.num_vectors, worker)
        chosen = np.sort(permute(np.arange(self.num_lists), self.num_vectors, derive_keys(0, self.seed)))
        own = chosen[(chosen >= first) & (chosen < last)] - first
        return self._scaled(np.concatenate(worker.gather_arrays(vectors_ND[own])))

    def _scale(self, vectors_ND: np.ndarray, worker: Worker) -> float:
        """By which channels are multiplied before they are rounded to integers: a power of two."""
        largest = max(worker.gather(float(np.abs(vectors_ND).max()) if len(vectors_ND) else 0.0))
        bits = _BITS - math.ceil(math.log2(max(2, self.num_vectors))) - math.frexp(largest)[1]
        return math.ldexp(1.0, min(bits, 1000))

    def _means(
        self, vectors_ND: np.ndarray, of: np.ndarray, centres_KD: np.ndarray, scale: float, worker: Worker, number: int
    ) -> tuple[np.ndarray, int]:
        """The next centres, and how many of them were empty."""
        edges = [rank * self.num_lists // worker.world_size for rank in range(worker.world_size + 1)]
        lists, counts, sums = _sums(vectors_ND, of, scale)
        cuts = np.searchsorted(lists, edges)
        parts = [slice(*pair) for pair in zip(cuts[:-1], cuts[1:], strict=True)]
        received = [
            worker.exchange([np.ascontiguousarray(array[part]).reshape(-1) for part in parts])
            for array in (lists, counts, sums)
        ]
        start, stop, dim = edges[worker.rank], edges[worker.rank + 1], centres_KD.shape[1]
        total, count = np.zeros((stop - start, dim), np.int64), np.zeros(stop - start, np.int64)
        for own, num, added in zip(*received, strict=True):
            total[own - start] += added.reshape(-1, dim)
            count[own - start] += num
        means = total / (np.maximum(count, 1)[:, None] * scale)
        means = np.where(count[:, None] > 0, means, centres_KD[start:stop]).astype(np.float32)
        every, counted = np.concatenate(worker.gather_arrays(means)), np.concatenate(worker.gather_arrays(count))
        num_empty = int((counted == 0).sum())
        _split(every, counted, np.random.default_rng((self.seed, number)))
        return self._scaled(every), num_empty

    def _scaled(self, centres_KD: np.ndarray) -> np.ndarray:
        if not self.spherical:
            return centres_KD
        lengths = np.sqrt((centres_KD.astype(np.float64) ** 2).sum(axis=1, keepdims=True))
        return (centres_KD / np.maximum(lengths, 1e-30)).astype(np.float32)


def _sums(vectors_ND: np.ndarray, of: np.ndarray, scale: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lists that vectors belong to, ascending, int64 [n]; how many do; and the sums of these in fixed point, int64
    [n, D]."""
    order = np.argsort(of, kind="stable")
    lists, counts = np.unique(of, return_counts=True)
    sums = np.zeros((len(lists), vectors_ND.shape[1]), dtype=np.int64)
    places = np.repeat(np.arange(len(lists)), counts)
    for start in range(0, len(order), 1 << 16):
        part = slice(start, start + (1 << 16))
        fixed = np.rint(vectors_ND[order[part]].astype(np.float64) * scale).astype(np.int64)
        begins = np.flatnonzero(np.diff(places[part], prepend=-1))
        sums[places[part][begins]] += np.add.reduceat(fixed, begins)
    return lists.astype(np.int64), counts.astype(np.int64), sums


def _split(centres_KD: np.ndarray, counts_K: np.ndarray, random: np.random.Generator) -> None:
    """Give each empty list half of another one's vectors, which is chosen with a probability that grows with their
    number, and move both centres a little apart. In place."""
    while len(empty := np.flatnonzero(counts_K == 0)):
        full = np.flatnonzero(counts_K > 1)
        if not len(full):
            return
        # Weighted, without replacement: the first of exponential waiting times.
        waited = random.exponential(size=len(full)) / (counts_K[full] - 1)
        number = min(len(empty), len(full))
        taken, empty = full[np.argsort(waited, kind="stable")[:number]], empty[:number]
        sign = np.where(np.arange(centres_KD.shape[1]) % 2 == 0, np.float32(_SHIFT), np.float32(-_SHIFT))
        centres_KD[empty] = centres_KD[taken] * (1 + sign)
        centres_KD[taken] = centres_KD[taken] * (1 - sign)
        counts_K[empty] = counts_K[taken] // 2
        counts_K[taken] -= counts_K[empty]
