"""What a token sees: its own segment, as much of it as the mode says, and nothing else.

Each check comes with its control: the mask is broken on purpose, and the check has to fail.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_grit.data.indexed.roles import RowKind
from megatron_grit.data.rows.batch import PackedRow
from megatron_grit.models import attention
from megatron_grit.models.attention import AttentionMode, PackedSegments
from megatron_grit.models.decoder import GritDecoder, Output, build_model
from megatron_grit.parallel.context import ParallelContext
from tests.rows import TWO_PASSES, VOCAB, make_row, tiny_config

LENGTHS = [12, 7, 16]  # and 5 tokens of padding
ROW_LENGTH = 40
FIRST, SECOND, THIRD, PADDING = slice(0, 12), slice(12, 19), slice(19, 35), slice(35, 40)


@pytest.fixture(scope="module", params=[None, 4], ids=["dense", "moe"])
def model(request: pytest.FixtureRequest, context: ParallelContext) -> GritDecoder:
    return build_model(tiny_config(experts=request.param), VOCAB, context).eval()


def states(model: GritDecoder, row: PackedRow) -> Tensor:
    with torch.no_grad():
        return model(row, Output.HIDDEN)[:, 0]


def with_token_changed(row: PackedRow, position: int) -> PackedRow:
    changed = copy.deepcopy(row)
    changed.tokens_1T[0, position] = (changed.tokens_1T[0, position] + 1) % VOCAB
    return changed


def differences(model: GritDecoder, kind: RowKind, position: int) -> Tensor:
    """Largest change of each token's state when one token changes: [T]."""
    row = make_row(kind, LENGTHS, ROW_LENGTH)
    return (states(model, row) - states(model, with_token_changed(row, position))).abs().amax(1)


def assert_no_leak(model: GritDecoder, kind: RowKind) -> None:
    """A change in the second segment moves nothing outside it, bit for bit; nor does one in the padding."""
    for position in (SECOND.start, SECOND.stop - 1):
        changes = differences(model, kind, position)
        assert changes[SECOND].max() > 1e-4
        for other in (FIRST, THIRD, PADDING):
            assert changes[other].max() == 0
    changes = differences(model, kind, PADDING.start + 2)
    assert changes[:35].max() == 0


def assert_causal(model: GritDecoder, kind: RowKind) -> None:
    changes = differences(model, kind, THIRD.start + 8)
    assert changes[THIRD.start : THIRD.start + 8].max() == 0
    assert changes[THIRD.start + 8 : THIRD.stop].min() > 1e-5


def assert_bidirectional(model: GritDecoder, kind: RowKind) -> None:
    changes = differences(model, kind, THIRD.stop - 1)
    assert changes[THIRD].min() > 1e-5


@pytest.mark.parametrize("kind", TWO_PASSES)
def test_another_segment_moves_nothing(model: GritDecoder, kind: RowKind) -> None:
    assert_no_leak(model, kind)


def test_generation_is_causal(model: GritDecoder) -> None:
    assert_causal(model, RowKind.GENERATIVE)


def test_embedding_is_bidirectional(model: GritDecoder) -> None:
    assert_bidirectional(model, RowKind.EMBEDDING)


def test_embedding_can_be_causal(context: ParallelContext) -> None:
    config = tiny_config()
    config.embedding.causal = True
    assert_causal(build_model(config, VOCAB, context).eval(), RowKind.EMBEDDING)


def broken(change: Callable[[PackedSegments], None]) -> Callable[..., PackedSegments]:
    original = PackedSegments.of_row

    def of_row(*row: Any) -> PackedSegments:
        segments = original(*row)
        change(segments)
        return segments

    return of_row


def lose_boundaries(segments: PackedSegments) -> None:
    segments.lengths = [sum(segments.lengths)]


def fall_back_to_causal(segments: PackedSegments) -> None:
    segments.mode = AttentionMode.CAUSAL


def fall_back_to_bidirectional(segments: PackedSegments) -> None:
    segments.mode = AttentionMode.BIDIRECTIONAL


@pytest.mark.parametrize(
    ("damage", "check", "kind"),
    [
        (lose_boundaries, assert_no_leak, RowKind.EMBEDDING),
        (lose_boundaries, assert_no_leak, RowKind.GENERATIVE),
        (fall_back_to_causal, assert_bidirectional, RowKind.EMBEDDING),
        (fall_back_to_bidirectional, assert_causal, RowKind.GENERATIVE),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_checks_fail_when_the_mask_is_broken(
    model: GritDecoder,
    monkeypatch: pytest.MonkeyPatch,
    damage: Callable[[PackedSegments], None],
    check: Callable[[GritDecoder, RowKind], None],
    kind: RowKind,
) -> None:
    monkeypatch.setattr(PackedSegments, "of_row", staticmethod(broken(damage)))
    with pytest.raises(AssertionError):
        check(model, kind)


def test_a_row_without_a_mode_is_refused(model: GritDecoder, monkeypatch: pytest.MonkeyPatch) -> None:
    def forget(segments: PackedSegments) -> None:
        segments.mode = None

    monkeypatch.setattr(PackedSegments, "of_row", staticmethod(broken(forget)))
    with pytest.raises(AssertionError, match="no attention mode"):
        states(model, make_row(RowKind.EMBEDDING, LENGTHS, ROW_LENGTH))


def test_packed_equals_alone(model: GritDecoder) -> None:
    """Embeddings and token losses of a packed row are those of each segment in a row of its own."""
    for kind, output in ((RowKind.EMBEDDING, Output.EMBEDDINGS), (RowKind.GENERATIVE, Output.TOKEN_LOSSES)):
        row = make_row(kind, LENGTHS, ROW_LENGTH)
        with torch.no_grad():
            packed = model(row, output)
        for index, part in enumerate((FIRST, SECOND, THIRD)):
            alone = make_row(kind, [part.stop - part.start], part.stop - part.start)
            alone.tokens_1T = row.tokens_1T[:, part]
            assert row.labels_1T is not None
            alone.labels_1T = row.labels_1T[:, part]
            with torch.no_grad():
                expected = model(alone, output)
            ours = packed[index : index + 1] if kind is RowKind.EMBEDDING else packed[part]
            torch.testing.assert_close(ours, expected, rtol=0, atol=2e-6)


def test_sliding_window_holds_in_causal_mode_only(context: ParallelContext) -> None:
    """One layer with a window of 4: a token reaches three positions ahead, in embedding mode everywhere."""
    model = build_model(tiny_config(num_layers=1, sliding_window=4), VOCAB, context).eval()
    changes = differences(model, RowKind.GENERATIVE, THIRD.start + 2)
    assert changes[THIRD.start : THIRD.start + 2].max() == 0
    assert changes[THIRD.start + 2 : THIRD.start + 6].min() > 1e-5
    assert changes[THIRD.start + 6 : THIRD.stop].max() == 0
    assert_bidirectional(model, RowKind.EMBEDDING)


@pytest.mark.parametrize("num_queries", [1, 3, 9])
@pytest.mark.parametrize("window", [None, 4])
def test_attend_with_earlier_keys(num_queries: int, window: int | None) -> None:
    """The last queries of a segment get what they get when all of it is computed at once, written out in full."""
    query, key, value = (
        torch.randn(9, heads, 8, generator=torch.Generator().manual_seed(heads)) for heads in (4, 2, 2)
    )
    ours = attention.attend(query[-num_queries:], key, value, causal=True, window=window)
    scores = torch.einsum("qnh,knh->nqk", query, key.repeat_interleave(2, 1)) / 8**0.5
    distance = torch.arange(9)[:, None] - torch.arange(9)[None, :]
    hidden = (distance < 0) | (distance >= (window or 9))
    expected = torch.einsum(
        "nqk,knh->qnh", scores.masked_fill(hidden, -torch.inf).softmax(-1), value.repeat_interleave(2, 1)
    )
    torch.testing.assert_close(ours, expected[-num_queries:], rtol=1e-5, atol=1e-6)
