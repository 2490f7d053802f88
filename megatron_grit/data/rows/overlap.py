"""How much of what a row predicts stands in what it has read from a database: a measure of copying.

RETRO (arXiv 2112.04426, section 2.6) takes the longest run of tokens that a chunk and a neighbor have in common as a
share of the chunk. Here a chunk is compared with the neighbors that are read while it is predicted, which are those of
the chunk before it.

Shape suffix legend: T = tokens of a row, N = pairs of texts, L, M = tokens of a text.
"""

from __future__ import annotations

import numpy as np

from megatron_grit.data.rows.batch import PackedRow


def longest_common_runs(texts_NL: np.ndarray, others_NM: np.ndarray) -> np.ndarray:
    """Tokens of the longest run that stands in both texts of a pair.

    Args:
        texts_NL: int, padded with a number that is not in ``others_NM``.
        others_NM: int, padded with a number that is not in ``texts_NL``.

    Returns:
        int64 [N].
    """
    run_NM = np.zeros(others_NM.shape, dtype=np.int64)
    longest_N = np.zeros(len(others_NM), dtype=np.int64)
    for place in range(texts_NL.shape[1]):
        before = np.pad(run_NM[:, :-1], ((0, 0), (1, 0)))
        run_NM = np.where(others_NM == texts_NL[:, place, None], before + 1, 0)
        longest_N = np.maximum(longest_N, run_NM.max(axis=1, initial=0))
    return longest_N


def read_overlap(row: PackedRow, chunk_length: int) -> np.ndarray:
    """Of each token that is predicted: the longest run of tokens that its chunk has in common with a neighbor that is
    read meanwhile, as a share of ``chunk_length``.

    Args:
        row: on the host.
        chunk_length: tokens of a chunk. A segment's last chunk may be shorter: what is copied counts, not its share.

    Returns:
        float64 [T], at the positions that predict; NaN where no neighbor is read.
    """
    overlap_T = np.full(row.tokens_1T.shape[1], np.nan)
    neighbors = row.neighbors
    if neighbors is None:
        return overlap_T
    bounds_C2, ends_C, text_of_Ck = neighbors.chunk_bounds_C2, neighbors.segment_ends_C, neighbors.text_of_Ck
    # Pairs of a chunk that has another one behind it, and one of its neighbors.
    chunks, which = np.nonzero((text_of_Ck >= 0) & (bounds_C2[:, 1] < ends_C)[:, None])
    if not len(chunks):
        return overlap_T
    tokens_T = row.tokens_1T[0].numpy()
    stops_U = np.cumsum(neighbors.lengths_U)
    texts = text_of_Ck[chunks, which]
    predicted = _padded(tokens_T, bounds_C2[chunks + 1, 0], bounds_C2[chunks + 1, 1], -1)
    read = _padded(neighbors.tokens_1N[0].numpy(), stops_U[texts] - neighbors.lengths_U[texts], stops_U[texts], -2)
    longest = np.zeros(len(bounds_C2), dtype=np.int64)
    np.maximum.at(longest, chunks, longest_common_runs(predicted, read))
    for chunk in np.unique(chunks).tolist():
        start, stop = bounds_C2[chunk + 1]
        overlap_T[start - 1 : stop - 1] = longest[chunk] / chunk_length
    return overlap_T


def _padded(tokens: np.ndarray, starts: np.ndarray, stops: np.ndarray, padding: int) -> np.ndarray:
    """int64 [n, longest]: the stretches of an array."""
    index = starts[:, None] + np.arange((stops - starts).max())
    found: np.ndarray = np.where(index < stops[:, None], tokens[np.minimum(index, len(tokens) - 1)], padding)
    return found
