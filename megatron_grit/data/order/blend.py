"""Which source each slot of a stream comes from: a pure function of the slot, in proportion at every moment.

The visits of source s stand at (k + 1/2) / w_s on a line, k = 0, 1, ...; slot t is the t-th visit on that line, ties
by number of the source (stride scheduling: Waldspurger and Weihl 1995; the divisor method of Webster and
Sainte-Lague). After t slots a source has had its share of t to within one visit when there are two of them, and to
within a few at any number. Nothing is built: the visits around a slot are found where its place on the line has to be.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_grit.config.blend import BlendEntry
from megatron_grit.data.order.permutation import derive_keys, permute


class StrideSchedule:
    """Slots dealt to sources in proportion to their weights.

    Args:
        weights: positive, [num_sources].
    """

    def __init__(self, weights: Sequence[float] | np.ndarray) -> None:
        self._weights = np.asarray(weights, dtype=np.float64)
        self._total = float(self._weights.sum())
        self._margin = len(self._weights) + 2

    def slots(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Source of each slot from ``start`` to ``stop - 1``, and how often the source came before: int64 each."""
        sources, visits, skipped = self._candidates(start, stop)
        chosen = slice(start - skipped, stop - skipped)
        return sources[chosen], visits[chosen]

    def counts(self, num_slots: int) -> np.ndarray:
        """Visits of each source in the first ``num_slots`` slots: int64 [num_sources]."""
        sources, _, skipped = self._candidates(num_slots, num_slots)
        before = self._visits_before(self._low(num_slots))
        return before + np.bincount(sources[: num_slots - skipped], minlength=len(self._weights))

    def _low(self, start: int) -> float:
        return (start - self._margin) / self._total

    def _candidates(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, int]:
        """Visits in their order that hold those slots, and how many visits there are before them.

        Up to x on the line there are sum(floor(w_s x + 1/2)) visits, which is x * sum(w_s) to within half the number of
        sources; twice that is added on either side, so that a visit at the very end never matters.
        """
        first = self._visits_before(self._low(start))
        last = self._visits_before((stop + self._margin) / self._total)
        counts = last - first
        sources = np.repeat(np.arange(len(counts)), counts)
        ends = np.cumsum(counts)
        visits = np.arange(len(sources)) - np.repeat(ends - counts - first, counts)
        order = np.lexsort((sources, self._place(sources, visits)))
        return sources[order], visits[order], int(first.sum())

    def _place(self, sources: np.ndarray, visits: np.ndarray) -> np.ndarray:
        return (visits + 0.5) / self._weights[sources]

    def _visits_before(self, place: float) -> np.ndarray:
        """Visits of each source that stand before ``place``, give or take one by rounding: int64 [num_sources]."""
        return np.maximum(np.floor(self._weights * place + 0.5), 0).astype(np.int64)


class RecordOrder:
    """The record that each visit of a source takes: epoch after epoch, each a permutation of its own.

    Args:
        sizes: records of each source.
        caps: most records of each source that are used, a subset drawn once; None: all.
        key: uint64; another key, another order.
    """

    def __init__(self, sizes: Sequence[int] | np.ndarray, caps: Sequence[int | None], key: np.uint64) -> None:
        self.all_sizes = np.asarray(sizes, dtype=np.int64)
        limits = [int(size) if cap is None else cap for size, cap in zip(sizes, caps, strict=True)]
        self.sizes = np.minimum(self.all_sizes, np.array(limits, dtype=np.int64))
        """Records of each source that are used: int64 [num_sources]."""
        every = np.arange(len(self.all_sizes))
        self._subset_keys = derive_keys(key, 1, every)
        self._epoch_keys = derive_keys(key, 2, every)

    def epoch_key(self, source: np.ndarray | int, epoch: np.ndarray | int) -> np.ndarray:
        """Key of the permutation of an epoch."""
        return derive_keys(self._epoch_keys[source], epoch)

    def at(self, sources: np.ndarray, visits: np.ndarray) -> np.ndarray:
        """Record of each visit: int64."""
        sizes = self.sizes[sources]
        epochs, places = np.divmod(visits, sizes)
        return self.in_epoch(sources, epochs, places)

    def in_epoch(self, sources: np.ndarray, epochs: np.ndarray | int, places: np.ndarray) -> np.ndarray:
        """Record at each place of an epoch: int64."""
        used = permute(places, self.sizes[sources], self.epoch_key(sources, epochs))
        return self.members(sources, used)

    def members(self, sources: np.ndarray, used: np.ndarray) -> np.ndarray:
        """Record of each number from 0 to the source's used size - 1: its place in the subset that a cap leaves."""
        capped = self.sizes[sources] < self.all_sizes[sources]
        if not capped.any():
            return used
        records = permute(used, self.all_sizes[sources], self._subset_keys[sources])
        return np.where(capped, records, used)

    def subset(self, source: int) -> np.ndarray | None:
        """Records of a capped source that are used, by number; None: all of them."""
        if self.sizes[source] == self.all_sizes[source]:
            return None
        return permute(np.arange(self.sizes[source]), self.all_sizes[source], self._subset_keys[source])


def blend_weights(entries: Sequence[BlendEntry], sizes: np.ndarray) -> np.ndarray:
    """Weight of each source in samples: what it says, or its epochs x its size; by default one epoch."""
    return np.array(
        [
            entry.weight if entry.weight is not None else (entry.epochs or 1.0) * size
            for entry, size in zip(entries, sizes.tolist(), strict=True)
        ]
    )
