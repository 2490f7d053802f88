"""What the ranks of a context parallel group hold and see, against the definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_grit.models.attention import attend
from megatron_grit.models.row_share import RowShare, gathered_places, held_positions

GROUP: Any = None  # nothing is exchanged here


def share_of(row_length: int, rank: int, size: int) -> RowShare:
    return RowShare(held_positions(row_length, rank, size), row_length, rank, size, GROUP)


@st.composite
def rows(draw: st.DrawFn) -> tuple[list[int], int]:
    """Lengths of segments, and a number of ranks whose double divides their sum."""
    size = draw(st.integers(2, 4))
    lengths = draw(st.lists(st.integers(1, 12), min_size=1, max_size=8))
    lengths.append(2 * size - sum(lengths) % (2 * size))
    return lengths, size


@given(rows(), st.booleans())
def test_ranks_see_what_the_row_allows(row: tuple[list[int], int], causal: bool) -> None:
    lengths, size = row
    total = sum(lengths)
    segment = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    position_of_place = torch.argsort(gathered_places(total, size))
    held = []
    for rank in range(size):
        share = share_of(total, rank, size)
        pieces = share.pieces(lengths, causal)
        keys = position_of_place[pieces.key_index_K].split(pieces.key_lengths)
        queries = share.index_L.split(pieces.query_lengths)
        for queries_of_piece, keys_of_piece in zip(queries, keys, strict=True):
            offset = len(keys_of_piece) - len(queries_of_piece) + 1
            for number, query in enumerate(queries_of_piece.tolist()):
                seen = keys_of_piece[: offset + number] if causal else keys_of_piece
                allowed = (segment == segment[query]) & (torch.arange(total) <= (query if causal else total))
                assert seen.tolist() == allowed.nonzero().squeeze(1).tolist()
        held += share.index_L.tolist()
    assert sorted(held) == list(range(total))


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("causal", [True, False])
def test_attention_by_pieces(causal: bool, window: int | None) -> None:
    """Each rank's outputs are those of the whole row at its positions."""
    lengths, size, heads = [9, 4, 11], 3, 2
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, sum(lengths), heads, 8, generator=generator)
    parts = zip(query.split(lengths), key.split(lengths), value.split(lengths), strict=True)
    whole = torch.cat([attend(*part, causal, window) for part in parts])
    order = torch.cat([held_positions(24, rank, size) for rank in range(size)])
    for rank in range(size):
        share = share_of(24, rank, size)
        pieces = share.pieces(lengths, causal)
        keys, values = (tensor[order][pieces.key_index_K].split(pieces.key_lengths) for tensor in (key, value))
        queries = query[share.index_L].split(pieces.query_lengths)
        ours = torch.cat([attend(*part, causal, window) for part in zip(queries, keys, values, strict=True)])
        torch.testing.assert_close(ours, whole[share.index_L])


def test_a_causal_pass_is_shared_evenly() -> None:
    """Pairs of query and key differ by less than 2 % between ranks; consecutive quarters would have 1 : 7."""
    work = []
    for rank in range(4):
        pieces = share_of(1024, rank, 4).pieces([1024], causal=True)
        lengths = zip(pieces.query_lengths, pieces.key_lengths, strict=True)
        work.append(sum(queries * keys - queries * (queries - 1) // 2 for queries, keys in lengths))
    assert sum(work) == 1024 * 1025 // 2
    assert max(work) < 1.02 * min(work)


def test_a_row_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="30 tokens does not divide into 4"):
        held_positions(30, 0, 2)
