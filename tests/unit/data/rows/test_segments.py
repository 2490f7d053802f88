"""Records that are too long: every label once where they are split, and spans that fit the tokens."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from megatron_grit.data.indexed.label_weights import ANSWERS
from megatron_grit.data.indexed.roles import SUPERVISED, Role, num_labels
from megatron_grit.data.rows.segments import ranges, spans_between

SPANS = st.lists(st.tuples(st.sampled_from([Role.TEMPLATE, Role.ANSWER]), st.integers(1, 12)), min_size=1, max_size=8)


def per_token(roles: list[int], lengths: list[int]) -> list[int]:
    return [role for role, length in zip(roles, lengths, strict=True) for _ in range(length)]


@given(spans=SPANS, limit=st.integers(2, 20), data=st.data())
def test_split_pieces_train_every_label_once(spans: list[tuple[int, int]], limit: int, data: st.DataObject) -> None:
    multiple = data.draw(st.integers(1, limit - 1))
    roles, lengths = [role for role, _ in spans], [length for _, length in spans]
    tokens = per_token(roles, lengths)
    pieces = ranges(len(tokens), limit, "split", multiple)
    assert all(start % multiple == 0 for start, _ in pieces)
    trained: list[int] = []
    for start, stop in pieces:
        assert 0 < stop - start <= limit
        labels = [place for place in range(start + 1, stop) if tokens[place] in SUPERVISED]
        own = spans_between(roles, lengths, start, stop)
        assert ANSWERS.total(*own, starts_record=not start) == (len(labels), len(labels))
        trained += labels
    assert trained == [place for place in range(1, len(tokens)) if tokens[place] in SUPERVISED]
    assert len(trained) == num_labels(roles, lengths)
    covered = {place for start, stop in pieces for place in range(start, stop)}
    assert covered == set(range(len(tokens)))


@given(spans=SPANS, data=st.data())
def test_spans_of_a_range(spans: list[tuple[int, int]], data: st.DataObject) -> None:
    roles, lengths = [role for role, _ in spans], [length for _, length in spans]
    tokens = per_token(roles, lengths)
    start = data.draw(st.integers(0, len(tokens) - 1))
    stop = data.draw(st.integers(start + 1, len(tokens)))
    assert per_token(*spans_between(roles, lengths, start, stop)) == tokens[start:stop]


def test_policies() -> None:
    for policy in ("stop", "drop", "truncate", "split"):
        assert ranges(10, 10, policy) == [(0, 10)]
    assert ranges(11, 10, "stop") == [(0, 11)]
    assert ranges(11, 10, "drop") == []
    assert ranges(11, 10, "truncate") == [(0, 10)]
    assert ranges(11, 10, "split") == [(0, 10), (9, 11)]
    assert ranges(28, 10, "split") == [(0, 10), (9, 19), (18, 28)]
    assert ranges(28, 10, "split", 4) == [(0, 9), (8, 17), (16, 25), (24, 28)]
    assert ranges(25, 9, "split", 8) == [(0, 9), (8, 17), (16, 25)]
