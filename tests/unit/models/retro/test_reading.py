"""What a token of a Retro model sees: neighbors of chunks that have ended, of its own segment, and nothing else.

Each check comes with its control: the plan is broken on purpose, and the check has to fail.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_grit.config.schema.retro import RetroConfig
from megatron_grit.data.indexed.roles import RowKind
from megatron_grit.data.rows.batch import PackedRow
from megatron_grit.data.rows.neighbors import Neighbors
from megatron_grit.models.decoder import GritDecoder, Output, build_model
from megatron_grit.models.retro import plan as plans
from megatron_grit.parallel.context import ParallelContext
from tests.neighbors import with_neighbors
from tests.rows import VOCAB, make_row, tiny_config

CHUNK = 6


def build(context: ParallelContext, **retro: Any) -> GritDecoder:
    knobs = {"num_neighbors": 2, "chunk_length": CHUNK, "layers": [1, 2]}
    torch.manual_seed(3)
    return build_model(tiny_config(num_layers=3, retro=RetroConfig(**(knobs | retro))), VOCAB, context).eval()


@pytest.fixture(scope="module")
def model(context: ParallelContext) -> GritDecoder:
    return build(context)


def states(model: GritDecoder, row: PackedRow) -> Tensor:
    with torch.no_grad():
        return model(row, Output.HIDDEN)[:, 0]


def changed_tokens(model: GritDecoder, row: PackedRow, other: PackedRow) -> list[int]:
    """Tokens whose states differ between two rows."""
    return (states(model, row) - states(model, other)).abs().amax(1).gt(1e-6).nonzero()[:, 0].tolist()


def with_neighbor_changed(row: PackedRow, chunk: int, place: int) -> PackedRow:
    """The row with every token of one neighbor changed."""
    neighbors = copy.deepcopy(row.neighbors)
    assert neighbors is not None
    text = neighbors.text_of_Ck[chunk, place]
    end = int(neighbors.lengths_U[: text + 1].sum())
    part = neighbors.tokens_1N[0, end - int(neighbors.lengths_U[text]) : end]
    part.copy_((part + 7) % VOCAB)
    return replace(row, neighbors=neighbors)


def segment_of(row: PackedRow, token: int) -> range:
    bounds = row.cu_seqlens.tolist()
    index = int(np.searchsorted(bounds, token, side="right"))
    return range(bounds[index - 1], bounds[index])


def assert_reads_what_it_may(model: GritDecoder, row: PackedRow, token: int) -> None:
    """A change of a token, and of each neighbor, moves later tokens of its segment and no others."""
    other = copy.deepcopy(row)
    other.tokens_1T[0, token] = (other.tokens_1T[0, token] + 1) % VOCAB
    segment = segment_of(row, token)
    assert changed_tokens(model, row, other) == list(range(token, segment.stop))
    neighbors = row.neighbors
    assert neighbors is not None
    for chunk, (start, stop) in enumerate(neighbors.chunk_bounds_C2.tolist()):
        for place in np.flatnonzero(neighbors.text_of_Ck[chunk] >= 0):
            moved = changed_tokens(model, row, with_neighbor_changed(row, chunk, int(place)))
            assert moved == list(range(stop - 1, segment_of(row, start).stop))


def draw_row(seed: int, lengths: list[int], padding: int, num_neighbors: int = 2, **options: Any) -> PackedRow:
    row = make_row(RowKind.GENERATIVE, lengths, sum(lengths) + padding, seed=seed)
    return with_neighbors(row, CHUNK, num_neighbors, missing=0.3, seed=seed, **options)


@settings(max_examples=12)
@given(data=st.data(), seed=st.integers(0, 1000), padding=st.integers(0, 4), count=st.integers(1, 3))
def test_nothing_is_seen_before_its_time(
    model: GritDecoder, data: st.DataObject, seed: int, padding: int, count: int
) -> None:
    lengths = data.draw(st.lists(st.integers(1, 20), min_size=1, max_size=3))
    firsts = [data.draw(st.integers(1, CHUNK)) for _ in lengths]
    row = draw_row(seed, lengths, padding, count, first_lengths=firsts)
    assert_reads_what_it_may(model, row, data.draw(st.integers(0, sum(lengths) - 1)))


def one_too_early(neighbors: Neighbors, chunk: int) -> np.ndarray:
    return np.maximum(GROUP(neighbors, chunk) - 1, 0)


def chunk_itself(neighbors: Neighbors, chunk: int) -> np.ndarray:
    return np.arange(*neighbors.chunk_bounds_C2[chunk])


def no_mask(lists: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    index, mask = PADDED(lists)
    # Queries keep theirs: they are told by it where they belong.
    return index, mask if mask.shape[1] <= CHUNK else np.ones_like(mask)


def one_segment(neighbors: Neighbors, chunk: int) -> np.ndarray:
    ends = np.full_like(neighbors.segment_ends_C, neighbors.segment_ends_C.max())
    return GROUP(replace(neighbors, segment_ends_C=ends), chunk)


GROUP, PADDED = plans._group, plans._padded


@pytest.mark.parametrize(
    ("name", "damage"),
    [("_group", one_too_early), ("_group", chunk_itself), ("_group", one_segment), ("_padded", no_mask)],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_broken_plan_is_seen(
    model: GritDecoder, monkeypatch: pytest.MonkeyPatch, name: str, damage: Callable[..., Any]
) -> None:
    row = draw_row(1, [15, 9], 3)
    assert_reads_what_it_may(model, row, 2)
    monkeypatch.setattr(plans, name, damage)
    with pytest.raises(AssertionError):
        assert_reads_what_it_may(model, row, 2)


def without(model: GritDecoder, row: PackedRow) -> Tensor:
    return states(model, replace(row, neighbors=None))


def test_a_row_without_neighbors_is_that_of_the_decoder_alone(model: GritDecoder, context: ParallelContext) -> None:
    row = make_row(RowKind.GENERATIVE, [17, 8], 28)
    alone = build_model(tiny_config(num_layers=3), VOCAB, context).eval()
    alone.load_state_dict(model.state_dict(), strict=False)
    expected = states(alone, row)
    empty = with_neighbors(row, CHUNK, missing=1.0)
    assert torch.equal(states(model, empty), expected)
    assert torch.equal(without(model, row), expected)
    # Only the chunk without neighbors is left alone.
    some = with_neighbors(row, CHUNK, missing=0.5, seed=3)
    assert some.neighbors is not None and (some.neighbors.text_of_Ck < 0).all(1).any()
    assert (states(model, some) - expected).abs().max() > 1e-3


@pytest.mark.parametrize(("gate", "equal"), [(0.0, True), (None, True), (0.5, False)])
def test_gates_that_are_zero_add_nothing(context: ParallelContext, gate: float | None, equal: bool) -> None:
    model, row = build(context, gate=gate), draw_row(2, [20], 2)
    difference = (states(model, row) - without(model, row)).abs().max()
    assert (difference == 0) == equal
    if gate is None:
        losses = model(row, Output.TOKEN_LOSSES).sum()
        losses.backward()
        gates = {name: parameter.grad for name, parameter in model.named_parameters() if name.endswith("gate")}
        assert len(gates) == 2 and all(gradient.abs() > 0 for gradient in gates.values() if gradient is not None)


def test_the_order_of_neighbors_changes_nothing(model: GritDecoder) -> None:
    row = draw_row(4, [20, 7], 0)
    neighbors = row.neighbors
    assert neighbors is not None
    swapped = replace(row, neighbors=replace(neighbors, text_of_Ck=neighbors.text_of_Ck[:, ::-1].copy()))
    torch.testing.assert_close(states(model, row), states(model, swapped), atol=1e-5, rtol=0)
    other_chunk = replace(row, neighbors=replace(neighbors, text_of_Ck=np.roll(neighbors.text_of_Ck, 1, 0)))
    assert (states(model, row) - states(model, other_chunk)).abs().max() > 1e-3


def test_what_several_chunks_read_is_encoded_once_where_the_encoder_is_not_conditioned(
    context: ParallelContext,
) -> None:
    model = build(context, encoder_conditioning="none")
    assert not any("encoder" in name and "cross" in name for name, _ in model.named_parameters())
    row = draw_row(5, [18, 6], 0)
    neighbors = row.neighbors
    assert neighbors is not None
    one = np.where(neighbors.text_of_Ck >= 0, 0, -1)
    length = int(neighbors.lengths_U[0])
    shared = replace(
        neighbors, text_of_Ck=one, lengths_U=neighbors.lengths_U[:1], tokens_1N=neighbors.tokens_1N[:, :length]
    )
    count = int((one >= 0).sum())
    places = np.full_like(one, -1)
    places[one >= 0] = np.arange(count)
    copies = replace(
        neighbors,
        text_of_Ck=places,
        lengths_U=np.full(count, length),
        tokens_1N=shared.tokens_1N.repeat(1, count),
    )
    pair = [states(model, replace(row, neighbors=which)) for which in (shared, copies)]
    torch.testing.assert_close(pair[0], pair[1], atol=1e-5, rtol=0)


def test_neighbors_do_not_see_each_other_in_the_encoder(context: ParallelContext) -> None:
    """With a conditioned encoder too: the neighbors of a chunk meet only in the decoder's softmax."""
    model = build(context)
    row = draw_row(6, [12], 0)
    seen: list[Tensor] = []
    encoder = model.decoder.layers[1].encoder
    handle = encoder.register_forward_hook(lambda _module, _inputs, output: seen.append(output[:, 0].detach()))
    try:
        states(model, row)
        states(model, with_neighbor_changed(row, 0, int(np.flatnonzero(row.neighbors.text_of_Ck[0] >= 0)[0])))  # type: ignore[union-attr]
    finally:
        handle.remove()
    moved = (seen[0] - seen[1]).abs().amax(1) > 0
    assert moved.nonzero()[:, 0].tolist() == list(range(int(row.neighbors.lengths_U[0])))  # type: ignore[union-attr]
