"""Shared texts: which records have one is found by content, and no batch holds one twice."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_grit.data.indexed.records import IndexedRecords
from megatron_grit.data.indexed.roles import Role, RowKind
from megatron_grit.data.order import shared_texts
from megatron_grit.data.order.permutation import permute
from megatron_grit.data.order.shared_texts import (
    BoundRecords,
    EpochPlan,
    find_bound_records,
    hash_sequences,
    plan_epoch,
)
from tests.unit.data.indexed_files import pair, write

TEXTS = st.lists(st.lists(st.integers(0, 25), min_size=1, max_size=3), min_size=1, max_size=60)


def bound_records(texts: list[list[int]]) -> BoundRecords:
    records = np.repeat(np.arange(len(texts)), [len(held) for held in texts])
    return BoundRecords.from_pairs(records, np.array([number for held in texts for number in held], dtype=np.uint64))


def held_by(bound: BoundRecords) -> dict[int, set[int]]:
    spans = zip(bound.records.tolist(), bound.starts[:-1].tolist(), bound.starts[1:].tolist(), strict=True)
    return {record: set(bound.texts[start:stop].tolist()) for record, start, stop in spans}


@given(texts=TEXTS)
def test_bound_records_are_those_that_share(texts: list[list[int]]) -> None:
    counts = Counter(number for held in texts for number in set(held))
    shared = sorted(number for number, count in counts.items() if count > 1)
    new_number = {number: place for place, number in enumerate(shared)}
    expected = {record: {new_number[n] for n in held if n in new_number} for record, held in enumerate(texts)}
    assert held_by(bound_records(texts)) == {record: held for record, held in expected.items() if held}


@given(texts=TEXTS, data=st.data())
def test_within_a_subset(texts: list[list[int]], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(texts)))
    members = permute(np.arange(count), len(texts), 3)
    found = held_by(bound_records(texts).within(members))
    assert found == held_by(bound_records([texts[record] for record in members.tolist()]))


def no_text_twice(plan: EpochPlan, places: np.ndarray, bound: BoundRecords, size: int) -> None:
    holders = dict(zip(places.tolist(), held_by(bound).values(), strict=True))
    seen: set[int] = set()
    for number in range(plan.num_batches):
        batch = plan.batch(number).tolist()
        assert not seen & set(batch)
        seen.update(batch)
        held = [text for place in batch for text in holders.get(place, ())]
        assert len(held) == len(set(held))
    assert len(seen) == plan.num_batches * plan.batch_size and max(seen, default=0) < size


@given(texts=TEXTS, batch_size=st.integers(1, 8), key=st.integers(0, 2**60))
def test_batches_hold_no_text_twice(texts: list[list[int]], batch_size: int, key: int) -> None:
    size, bound = len(texts), bound_records(texts)
    places = permute(bound.records, size, key)
    plan = plan_epoch(places, bound, size, batch_size, key)
    no_text_twice(plan, places, bound, size)
    again = plan_epoch(places, bound, size, batch_size, key)
    assert (again.num_batches, again.moved) == (plan.num_batches, plan.moved)


@pytest.mark.parametrize(
    ("texts", "batch_size", "num_batches"),
    [
        ([[number // 2] for number in range(1000)], 50, 20),  # every text twice: nothing is lost
        ([[number // 2, 10_000 + number // 3] for number in range(1000)], 50, 20),
        ([[0] if number < 30 else [number] for number in range(100)], 10, 7),  # 7 batches: 7 of the 30, and 70 others
        ([[number // 19] for number in range(950)], 50, 19),  # each batch has to hold each text once
        ([[0] for _ in range(40)], 2, 0),
    ],
)
def test_as_many_batches_as_there_can_be(texts: list[list[int]], batch_size: int, num_batches: int) -> None:
    size, bound = len(texts), bound_records(texts)
    for key in range(3):
        places = permute(bound.records, size, key)
        plan = plan_epoch(places, bound, size, batch_size, key)
        no_text_twice(plan, places, bound, size)
        assert num_batches - (num_batches == 19) <= plan.num_batches <= num_batches


def test_few_records_change_places() -> None:
    """The work is that of the conflicts, and the order stays random."""
    bound = bound_records([[number // 2] for number in range(20_000)])
    places = permute(bound.records, 20_000, 9)
    plan = plan_epoch(places, bound, 20_000, 100, 9)
    assert plan.num_batches == 200
    assert 0 < len(plan.moved) < 300  # of 10,000 pairs about 50 meet


def records() -> list:
    spans = [pair(number, 100 + number) for number in range(20)]
    spans[3] = pair(3, 110)  # the positive of 10
    spans[7] = pair(7, 107, 103)  # a negative that is another's positive does not count
    spans[12] = pair(5, 112)  # the query of 5
    spans[15] = [(Role.QUERY, [4, 10 + 5]), *spans[15][2:]]  # the query of 10, without its instruction
    spans[18] = [*spans[18][:2], (Role.POSITIVE, [4, 17 + 5])]  # its positive is the query of 17
    return spans


def test_what_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prefix = write(tmp_path / "pairs", records(), RowKind.EMBEDDING)
    found = held_by(find_bound_records(IndexedRecords(prefix)))
    assert found.keys() == {3, 5, 10, 12, 15, 17, 18}
    together = {frozenset((a, b)) for a in found for b in found if a < b and found[a] & found[b]}
    assert together == {frozenset(pair) for pair in ((3, 10), (5, 12), (10, 15), (17, 18))}
    for tokens in (1, 7, 50):  # read in pieces
        monkeypatch.setattr(shared_texts, "_CHUNK_TOKENS", tokens)
        assert held_by(find_bound_records(IndexedRecords(prefix))) == found


@given(sequences=st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=4), min_size=1, max_size=30))
def test_hashes_tell_sequences_apart(sequences: list[list[int]]) -> None:
    tokens = np.array([token for sequence in sequences for token in sequence], dtype=np.uint16)
    hashes = hash_sequences(tokens, np.array([len(sequence) for sequence in sequences]))
    by_content: dict[tuple[int, ...], int] = {}
    for sequence, value in zip(sequences, hashes.tolist(), strict=True):
        assert by_content.setdefault(tuple(sequence), value) == value
    assert len(set(by_content.values())) == len(by_content)
