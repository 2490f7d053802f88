"""Neighbors of a row: the texts from a retrieval database that its chunks read.

Shape suffix legend: C = chunks of a row, k = neighbors of a chunk, U = texts, N = tokens of all texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor


@dataclass(kw_only=True)
class Neighbors:
    """The chunks of a packed row and the texts that they read.

    A chunk lies in one segment. The chunks of a segment follow each other from its first token to its last; the first
    and the last may be shorter than the others. In generation they may overlap, where neighbors are retrieved more
    often than a chunk has tokens, and begin before the row, in tokens that a cache holds.
    """

    chunk_bounds_C2: np.ndarray
    """int64 [C, 2]: first token of each chunk in the row, and the one after its last."""
    segment_ends_C: np.ndarray
    """int64 [C]: token after the last of the chunk's segment."""
    text_of_Ck: np.ndarray
    """int64 [C, k]: index of each neighbor among the texts; -1 where the chunk has none."""
    lengths_U: np.ndarray
    """int64 [U]: tokens of each text, at least 1."""
    tokens_1N: Tensor
    """int64 [1, N]: the texts one after another."""

    def to(self, device: torch.device) -> Neighbors:
        """Copy with the tokens on ``device``; the rest is for the host."""
        return replace(self, tokens_1N=self.tokens_1N.to(device))

    def padded(self, multiple: int) -> Neighbors:
        """Copy whose N is a multiple of a number; no chunk reads what is added."""
        missing = -self.tokens_1N.shape[1] % multiple
        return replace(self, tokens_1N=torch.nn.functional.pad(self.tokens_1N, (0, missing)))


def chunk_row(
    bounds: Sequence[int] | np.ndarray, first_lengths: Sequence[int] | np.ndarray, chunk_length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Split the segments of a row into chunks.

    Args:
        bounds: ends of the segments, with a 0 before them: S + 1 numbers.
        first_lengths: of the first chunk of each segment: ``chunk_length``, or less where the segment begins inside a
            chunk of its document.
        chunk_length: tokens of a chunk.

    Returns:
        ``chunk_bounds_C2`` and ``segment_ends_C`` of :class:`Neighbors`.
    """
    edges = np.asarray(bounds, dtype=np.int64)
    starts_S, ends_S = edges[:-1], edges[1:]
    firsts_S = starts_S + np.asarray(first_lengths, dtype=np.int64) - chunk_length  # where a whole first chunk began
    counts_S = -((firsts_S - ends_S) // chunk_length) * (ends_S > starts_S)
    segment_C = np.repeat(np.arange(len(counts_S)), counts_S)
    number_C = np.arange(len(segment_C)) - (np.cumsum(counts_S) - counts_S)[segment_C]
    begins_C, ends_C = (firsts_S[segment_C] + number_C * chunk_length), ends_S[segment_C]
    bounds_C2 = np.empty((len(segment_C), 2), dtype=np.int64)
    np.maximum(begins_C, starts_S[segment_C], out=bounds_C2[:, 0])
    np.minimum(begins_C + chunk_length, ends_C, out=bounds_C2[:, 1])
    return bounds_C2, ends_C
