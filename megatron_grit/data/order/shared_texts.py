"""Epochs of an embedding source in which no two records of a batch have a query or a positive in common.

Every other record's positive is a negative of a query, so a batch with the same question, or the same relevant passage,
twice trains the model to tell a text from itself. Records are compared by a 64-bit hash of the tokens of their query
and of all their positives, instructions left out; a query that equals another record's positive counts as well.

Only records that share a text with another one are looked at ("bound" records). An epoch is a permutation; where it
puts two records with a common text into one batch, one of them changes places with a record of another batch. What
cannot be placed is left out of that epoch, as is what does not fill a batch.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from megatron_grit.data.indexed.records import IndexedRecords
from megatron_grit.data.indexed.roles import Role
from megatron_grit.data.order.permutation import mix

_CHUNK_TOKENS = 1 << 22
_COMPARED = np.zeros(256, dtype=bool)
_COMPARED[[Role.QUERY, Role.POSITIVE]] = True


@dataclass(frozen=True, kw_only=True)
class BoundRecords:
    """Records of a source that share a text with another record.

    The shared texts of record ``records[i]`` are ``texts[starts[i] : starts[i + 1]]``.
    """

    records: np.ndarray
    """int64 [num_bound], ascending."""
    starts: np.ndarray
    """int64 [num_bound + 1]."""
    texts: np.ndarray
    """int64: numbers from 0 to num_texts - 1, ascending within a record, each in at least two records."""

    def __len__(self) -> int:
        return len(self.records)

    @cached_property
    def holders(self) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of the bound records that hold each text, one text after another, and where each text begins."""
        owners = np.repeat(np.arange(len(self)), np.diff(self.starts))
        order = np.argsort(self.texts, kind="stable")
        num_texts = int(self.texts.max()) + 1 if len(self.texts) else 0
        return owners[order], np.searchsorted(self.texts[order], np.arange(num_texts + 1))

    @staticmethod
    def from_pairs(records: np.ndarray, hashes: np.ndarray) -> BoundRecords:
        """From records and the hashes of their texts: int64 and uint64 [num_pairs]."""
        order = np.lexsort((records, hashes))
        records, hashes = records[order], hashes[order]
        new = np.ones(len(records), dtype=bool)
        new[1:] = (records[1:] != records[:-1]) | (hashes[1:] != hashes[:-1])
        records, hashes = records[new], hashes[new]  # a record with a text twice
        _, numbers, counts = np.unique(hashes, return_inverse=True, return_counts=True)
        shared = counts[numbers] > 1
        records, numbers = records[shared], numbers[shared]
        _, numbers = np.unique(numbers, return_inverse=True)
        order = np.lexsort((numbers, records))
        bound, lengths = np.unique(records[order], return_counts=True)
        starts = np.concatenate(([0], np.cumsum(lengths)))
        return BoundRecords(records=bound, starts=starts.astype(np.int64), texts=numbers[order].astype(np.int64))

    def within(self, members: np.ndarray | None) -> BoundRecords:
        """The same among some records only, renumbered by their place in ``members``; None: all, as they are."""
        if members is None or not len(self):
            return self
        order = np.argsort(members)
        place = np.searchsorted(members, self.records, sorter=order).clip(max=len(members) - 1)
        kept = members[order[place]] == self.records
        owner = np.repeat(np.arange(len(self)), np.diff(self.starts))
        chosen = kept[owner]
        return BoundRecords.from_pairs(order[place][owner[chosen]], self.texts[chosen].astype(np.uint64))


def find_bound_records(source: IndexedRecords) -> BoundRecords:
    """Read a source once and find the records that share a text.

    Raises:
        DataError: a damaged file.
    """
    file = source.file
    assert file.modes is not None
    all_records, all_hashes = [], []
    start = 0
    while start < file.num_sequences:
        stop = _end_of_chunk(file.pointers, start, _CHUNK_TOKENS * file.dtype.itemsize)
        compared = _COMPARED[file.modes[start:stop].view(np.uint8)]
        hashes = hash_sequences(file.read(start, stop), np.asarray(file.lengths[start:stop]))
        owners = np.searchsorted(file.documents, np.arange(start, stop)[compared], side="right") - 1
        all_records.append(owners)
        all_hashes.append(hashes[compared])
        start = stop
    return BoundRecords.from_pairs(np.concatenate(all_records), np.concatenate(all_hashes))


def _end_of_chunk(pointers: np.ndarray, start: int, num_bytes: int) -> int:
    stop = int(np.searchsorted(pointers[start:], int(pointers[start]) + num_bytes, side="right"))
    return start + max(stop - 1, 1) if start + stop < len(pointers) else len(pointers)


def hash_sequences(tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """A hash of each sequence's tokens and their order: uint64 [num_sequences].

    Args:
        tokens: of all sequences, one after another.
        lengths: int [num_sequences], all positive.
    """
    ends = np.cumsum(lengths, dtype=np.int64)
    starts = ends - lengths
    positions = np.arange(len(tokens), dtype=np.int64) - np.repeat(starts, lengths)
    mixed = mix(tokens.astype(np.uint64) + (positions.astype(np.uint64) << np.uint64(32)))
    return mix(np.add.reduceat(mixed, starts) + lengths.astype(np.uint64)) if len(starts) else mixed


@dataclass(frozen=True, kw_only=True)
class EpochPlan:
    """Batches of one epoch of a source: its permutation, but for a few exchanges."""

    num_batches: int
    batch_size: int
    moved: dict[int, int]
    """For some places of the epoch the place of the permutation whose record they get."""

    def batch(self, number: int) -> np.ndarray:
        """Places in the epoch's permutation that a batch takes: int64 [batch_size]."""
        start = number * self.batch_size
        moved = self.moved
        return np.array([moved.get(place, place) for place in range(start, start + self.batch_size)], dtype=np.int64)


def plan_epoch(places: np.ndarray, bound: BoundRecords, size: int, batch_size: int, key: int) -> EpochPlan:
    """As many batches without a common text as can be found.

    The time goes by the number of bound records (a sort) and by the number of them that have to move (Python).

    Args:
        places: int64 [num_bound]: where the epoch's permutation puts each bound record.
        bound: the records.
        size: records of the source.
        batch_size: records of a batch.
        key: decides who changes places with whom.
    """
    num_batches, step = size // batch_size, 1
    while num_batches > 0:
        dropped = _late_records(places, bound, num_batches)
        possible = (size - len(dropped)) // batch_size
        if possible < num_batches:
            num_batches = possible
            continue
        exchange = _Exchange(places, bound, size, batch_size, num_batches, key)
        exchange.move_out(dropped)
        if all(exchange.resolve(record) for record in exchange.conflicts()):
            return EpochPlan(num_batches=num_batches, batch_size=batch_size, moved=exchange.moved)
        num_batches, step = num_batches - step, 2 * step
    return EpochPlan(num_batches=0, batch_size=batch_size, moved={})


def _late_records(places: np.ndarray, bound: BoundRecords, num_batches: int) -> np.ndarray:
    """Bound records before which, in this epoch, as many records with one of their texts come as there are batches."""
    owners, begins = bound.holders
    sizes = np.diff(begins)
    if not (sizes > num_batches).any():
        return np.empty(0, dtype=np.int64)
    texts = np.repeat(np.arange(len(sizes)), sizes)
    order = np.lexsort((places[owners], texts))
    late = np.arange(len(owners)) - begins[texts] >= num_batches
    return np.unique(owners[order][late])


class _Exchange:
    """An epoch while records change places. Places from ``limit`` on belong to no batch."""

    def __init__(
        self, places: np.ndarray, bound: BoundRecords, size: int, batch_size: int, num_batches: int, key: int
    ) -> None:
        self.moved: dict[int, int] = {}
        self._bound, self._size, self._batch_size = bound, size, batch_size
        self._num_batches, self._limit = num_batches, num_batches * batch_size
        self._key = key
        self._place_of = places.copy()
        self._by_place = np.argsort(places)
        self._places = places[self._by_place]
        self._counts: dict[int, Counter[int]] = {}  # of a text: how often each batch holds it

    def move_out(self, records: np.ndarray) -> None:
        """Exchange bound records with records that no batch has."""
        gone = np.sort(self._place_of[records])
        leaving = set(records.tolist())
        spare = (place for place in range(self._limit, self._size) if self._record_at(place) not in leaving)
        for place in gone[gone < self._limit].tolist():
            self._swap(place, next(spare))

    def conflicts(self) -> list[int]:
        """Bound records that share a text with one before them in their batch, in the order of their places."""
        owners, begins = self._bound.holders
        texts = np.repeat(np.arange(len(begins) - 1), np.diff(begins))
        places = self._place_of[owners]
        order = np.lexsort((places, texts))
        texts, places, owners = texts[order], places[order], owners[order]
        batches = places // self._batch_size
        again = (texts[1:] == texts[:-1]) & (batches[1:] == batches[:-1]) & (places[1:] < self._limit)
        found = np.unique(owners[1:][again])
        return found[np.argsort(self._place_of[found])].tolist()

    def resolve(self, record: int) -> bool:
        """Give a bound record a batch that holds none of its texts, or none; False where that cannot be."""
        place = int(self._place_of[record])
        own, texts = place // self._batch_size, self._texts(record)
        if all(self._count(text)[own] == 1 for text in texts):
            return True  # the other one has moved
        start = (self._key + record * 0x9E3779B97F4A7C15) % self._num_batches
        for step in range(self._num_batches):
            batch = (start + step) % self._num_batches
            if not any(self._count(text)[batch] for text in texts):
                first = batch * self._batch_size
                if self._swap_with_one_of(place, own, texts, range(first, first + self._batch_size)):
                    return True
        return self._swap_with_one_of(place, own, texts, range(self._limit, self._size))

    def _swap_with_one_of(self, place: int, own: int, texts: set[int], candidates: range) -> bool:
        """Swap with the first record whose texts the batch ``own``, without ``texts``, does not hold."""
        for candidate in candidates:
            other = self._record_at(candidate)
            if other is None or all(self._count(text)[own] == (text in texts) for text in self._texts(other)):
                self._swap(place, candidate)
                return True
        return False

    def _swap(self, one: int, other: int) -> None:
        records = self._record_at(one), self._record_at(other)
        self.moved[one], self.moved[other] = self.moved.get(other, other), self.moved.get(one, one)
        for record, old, new in zip(records, (one, other), (other, one), strict=True):
            if record is None:
                continue
            self._place_of[record] = new
            for text in self._texts(record) & self._counts.keys():
                self._counts[text][old // self._batch_size] -= 1
                self._counts[text][new // self._batch_size] += 1

    def _record_at(self, place: int) -> int | None:
        """The bound record at a place, None where a free one stands there."""
        origin = self.moved.get(place, place)
        index = int(np.searchsorted(self._places, origin))
        if index < len(self._places) and self._places[index] == origin:
            return int(self._by_place[index])
        return None

    def _texts(self, record: int) -> set[int]:
        start, stop = self._bound.starts[record : record + 2].tolist()
        return set(self._bound.texts[start:stop].tolist())

    def _count(self, text: int) -> Counter[int]:
        if text not in self._counts:
            owners, begins = self._bound.holders
            members = owners[begins[text] : begins[text + 1]]
            self._counts[text] = Counter((self._place_of[members] // self._batch_size).tolist())
        return self._counts[text]
