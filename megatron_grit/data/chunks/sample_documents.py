"""Which documents training samples hold, whose chunks they do not read as neighbors."""

from __future__ import annotations

import numpy as np

from megatron_grit.data.chunks.versions import is_among


class SampleDocuments:
    """The documents that each of several samples holds.

    Args:
        samples: int [n], number of the sample of each document; a sample may hold several.
        keys: uint64 [n], of :func:`document_keys`.
    """

    def __init__(self, samples: np.ndarray, keys: np.ndarray) -> None:
        self._keys, numbers = np.unique(keys, return_inverse=True)
        self._pairs = np.unique(samples * len(self._keys) + numbers)

    def hold(self, samples: np.ndarray, keys_NK: np.ndarray) -> np.ndarray:
        """Whether sample ``samples[n]`` holds document ``keys_NK[n, k]``: bool [N, K]."""
        if not len(self._keys):
            return np.zeros(keys_NK.shape, dtype=bool)
        numbers = np.minimum(np.searchsorted(self._keys, keys_NK), len(self._keys) - 1)
        held = self._keys[numbers] == keys_NK
        if held.any():
            held &= is_among(samples[:, None] * len(self._keys) + numbers, self._pairs)
        return held
