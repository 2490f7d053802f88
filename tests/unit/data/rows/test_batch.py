"""Hashes of texts in packed rows."""

from __future__ import annotations

import pytest
import torch

from megatron_grit.data.indexed.roles import RowKind
from tests.rows import make_row


def test_equal_texts_have_equal_ids_wherever_they_stand() -> None:
    """The pooled tokens count, not the instruction before them, nor the row, its padding or the place in it."""
    one, other = make_row(RowKind.EMBEDDING, [6, 5, 9], 24, seed=1), make_row(RowKind.EMBEDDING, [4, 7], 12, seed=2)
    text = one.tokens_1T[0, 2:6].clone()  # the last four tokens of the first segment
    other.tokens_1T[0, 7:11] = text  # the last four of the second
    for row, instruction in ((one, slice(0, 2)), (other, slice(4, 7))):
        assert row.pool_mask_T is not None
        row.pool_mask_T[instruction] = 0
    ids, others = one.text_ids(), other.text_ids()
    assert ids[0] == others[1]
    assert len({*ids.tolist(), *others.tolist()}) == 4
    other.tokens_1T[0, 4:7] += 1
    assert torch.equal(other.text_ids(), others)
    for place in range(7, 11):
        other.tokens_1T[0, place] += 1
        assert other.text_ids()[1] != others[1]
        other.tokens_1T[0, place] -= 1


def test_order_and_length_of_tokens_count() -> None:
    row = make_row(RowKind.EMBEDDING, [3, 3, 2, 4], 12)
    row.tokens_1T[0] = torch.tensor([5, 6, 7, 7, 6, 5, 5, 6, 5, 6, 7, 0])
    assert len(set(row.text_ids().tolist())) == 4


def test_generative_rows_have_no_texts() -> None:
    row = make_row(RowKind.GENERATIVE, [3], 4)
    row.pool_mask_T = None
    with pytest.raises(ValueError, match="only rows that are embedded"):
        row.text_ids()
