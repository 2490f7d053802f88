"""How much of a chunk stands in what is read before it, against difflib."""

from __future__ import annotations

from difflib import SequenceMatcher

import numpy as np
import torch

from megatron_grit.data.rows.neighbors import Neighbors, chunk_row
from megatron_grit.data.rows.overlap import longest_common_runs, read_overlap
from tests.rows import RowKind, make_row


def longest(text: list[int], other: list[int]) -> int:
    return SequenceMatcher(None, text, other, autojunk=False).find_longest_match().size


def test_longest_common_run_is_that_of_difflib() -> None:
    draw = np.random.default_rng(3)
    texts, others = draw.integers(0, 3, (200, 12)), draw.integers(0, 3, (200, 17))
    texts[::2, 9:], others[::3, 5:] = -1, -2
    expected = [
        longest([t for t in text if t >= 0], [t for t in other if t >= 0])
        for text, other in zip(texts.tolist(), others.tolist(), strict=True)
    ]
    assert longest_common_runs(texts, others).tolist() == expected and len(set(expected)) > 5


def test_a_chunk_is_compared_with_what_the_one_before_it_reads() -> None:
    """Two segments, the first of which begins inside a chunk; a chunk without neighbors; padding."""
    row = make_row(RowKind.GENERATIVE, [14, 9], 32)
    tokens = row.tokens_1T[0].tolist()
    bounds, ends = chunk_row([0, 14, 23], [2, 4], 4)  # chunks begin at 0 2 6 10, 14 18 22
    texts = [
        [7] + tokens[3:6],  # read by the first chunk, predicted with it: the second; three tokens in common
        tokens[6:10] + [7],  # of the second: all of the third
        [7, 8],
        tokens[19:21] + [7],  # of the first of the other segment, beside one with less
        [7, tokens[18], 7],
        tokens[14:23],  # of the last one: nothing is predicted with it
    ]
    row.neighbors = Neighbors(
        chunk_bounds_C2=bounds,
        segment_ends_C=ends,
        text_of_Ck=np.array([[0, -1], [1, 2], [-1, -1], [-1, -1], [3, 4], [-1, -1], [5, -1]]),
        lengths_U=np.array([len(text) for text in texts]),
        tokens_1N=torch.tensor([[token for text in texts for token in text]]),
    )
    found = read_overlap(row, 4)
    shares = {1: 3 / 4, 5: 1.0, 17: 2 / 4}  # from the position that predicts a chunk's first token on
    expected = np.full(32, np.nan)
    for start, share in shares.items():
        expected[start : start + 4] = share
    np.testing.assert_array_equal(found, expected)
    row.neighbors = None
    assert np.isnan(read_overlap(row, 4)).all()
