"""Similar rows of a table of signatures, without comparing all with all: locality-sensitive hashing by bands.

The columns of a MinHash signature are cut into bands of a few columns; rows that are equal in a band share a bucket,
and only rows of one bucket are compared (Leskovec, Rajaraman, Ullman, Mining of Massive Datasets, section 3.4). Two
rows of similarity s, the share of equal columns, meet in one of b bands of r columns with probability 1 - (1 - s^r)^b.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

FOUND_AT_THRESHOLD = 0.9
"""Least probability with which two rows that are just similar enough share a bucket."""
MAX_LEADERS = 32
"""Rows of a bucket with which the others are compared, at most."""
_ROWS_AT_ONCE = 1 << 16
"""Rows whose signatures are compared at a time."""
_TILE = 4096
"""Rows that are hashed at a time, so that they stay in the cache."""

Entries = tuple[np.ndarray, np.ndarray]
"""uint64 [n], keys of buckets, ascending; int64 [n], rows, ascending within a key."""


@dataclass(frozen=True)
class Bands:
    """How the columns of signatures are cut: ``count`` bands of ``width`` columns."""

    count: int
    width: int

    def share_found(self, similarity: float | np.ndarray) -> float | np.ndarray:
        """Probability with which two rows of a similarity share a bucket."""
        return 1 - (1 - similarity**self.width) ** self.count


def choose_bands(threshold: float, num_columns: int) -> Bands:
    """The widest bands that find rows at the threshold with a probability of :data:`FOUND_AT_THRESHOLD`.

    Wide bands bring few rows together in vain, but miss more; what meets is compared. 128 columns at 0.8 are cut into
    16 bands of 8.

    Args:
        threshold: similarity from which rows are to be found, above 0 and at most 1.
        num_columns: of a signature.
    """
    for width in range(num_columns, 1, -1):
        bands = Bands(num_columns // width, width)
        if bands.share_found(threshold) >= FOUND_AT_THRESHOLD:
            return bands
    return Bands(num_columns, 1)


def mix64(values: np.ndarray) -> np.ndarray:
    """SplitMix64's finalizer (Steele et al., 2014), of uint64."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def band_keys(signatures: np.ndarray, bands: Bands) -> np.ndarray:
    """The bucket of every row in every band, by multilinear hashing (Dietzfelbinger, 1996).

    Args:
        signatures: uint32 [n, columns].
        bands: of :func:`choose_bands`.

    Returns:
        uint64 [bands.count, n], evenly spread.
    """
    num_columns = bands.count * bands.width
    factors = mix64(np.arange(num_columns, dtype=np.uint64)) | np.uint64(1)
    keys = np.empty((bands.count, len(signatures)), dtype=np.uint64)
    for start in range(0, len(signatures), _TILE):
        tile = signatures[start : start + _TILE, :num_columns] * factors
        keys[:, start : start + _TILE] = tile.reshape(-1, bands.count, bands.width).sum(axis=2).T
    return keys


def find_pairs(
    entries: Iterable[Entries],
    signatures: Callable[[np.ndarray], np.ndarray],
    threshold: float,
    *,
    first_new: int = 0,
) -> np.ndarray:
    """Rows that are similar to an earlier one of their bucket.

    The first row of a bucket is a leader. Each of the others, in their order, is compared with the leaders so far:
    where it is similar to one, it is left out because of the first such, else it is a leader as well. There are at most
    :data:`MAX_LEADERS`: further rows that are like none of them stay, and none is compared with them.

    Memory is that of the entries given at a time, of the signatures of some ten thousand rows, and of the result.

    Args:
        entries: of buckets in ascending order. A bucket may continue in the next entries.
        signatures: gives those of rows, [n, columns].
        threshold: share of equal columns from which rows are similar.
        first_new: only rows from this one on are left out; buckets without such a row are passed over.

    Returns:
        int64 [pairs, 2]: the row that is left out and the one because of which, in the order of the former. However the
        entries are cut, the pairs are the same.
    """
    found = [np.empty((0, 2), dtype=np.int64)]
    leaders: Entries = np.empty(0, dtype=np.uint64), np.empty(0, dtype=np.int64)  # of the bucket that may continue
    for keys, rows in entries:
        if not len(keys):
            continue
        keys, rows = _comparable(keys, rows, leaders[0], first_new)
        for start in range(0, len(keys), _ROWS_AT_ONCE):
            part = slice(start, start + _ROWS_AT_ONCE)
            goes_on = leaders[0][:1].tolist() == keys[part][:1].tolist()
            before = leaders if goes_on else (keys[:0], rows[:0])
            pairs, leaders = _compare(
                np.concatenate([before[0], keys[part]]), np.concatenate([before[1], rows[part]]), signatures, threshold
            )
            found.append(pairs[pairs[:, 0] >= first_new])
    pairs = np.concatenate(found)
    return pairs[np.argsort(pairs[:, 0], kind="stable")]


def _comparable(keys: np.ndarray, rows: np.ndarray, open_keys: np.ndarray, first_new: int) -> Entries:
    """Entries of buckets with a row to compare; those of the first and the last bucket stay if these may continue."""
    begins = np.flatnonzero(np.concatenate(([True], keys[1:] != keys[:-1])))
    sizes = np.diff(np.append(begins, len(keys)))
    wanted = (sizes > 1) & (rows[begins + sizes - 1] >= first_new)
    wanted[-1] = True
    wanted[0] |= keys[0] in open_keys
    chosen = np.repeat(wanted, sizes)
    return keys[chosen], rows[chosen]


def _compare(
    keys: np.ndarray, rows: np.ndarray, signatures: Callable[[np.ndarray], np.ndarray], threshold: float
) -> tuple[np.ndarray, Entries]:
    """The pairs among entries, and the leaders of their last bucket. A round is one leader more in every bucket."""
    content = signatures(rows)
    found, leaders = [np.empty((0, 2), dtype=np.int64)], []
    pending = np.arange(len(keys))
    for _ in range(MAX_LEADERS):
        own = keys[pending]
        is_leader = np.concatenate(([True], own[1:] != own[:-1]))
        leader = pending[is_leader]
        if keys[leader[-1]] == keys[-1]:
            leaders.append(rows[leader[-1]])
        others, of = pending[~is_leader], leader[np.cumsum(is_leader)[~is_leader] - 1]
        if not len(others):
            break
        is_similar = (content[others] == content[of]).mean(axis=1) >= threshold
        found.append(np.stack([rows[others[is_similar]], rows[of[is_similar]]], axis=1))
        pending = others[~is_similar]
        if not len(pending):
            break
    return np.concatenate(found), (np.full(len(leaders), keys[-1]), np.array(leaders, dtype=np.int64))


def cut_runs(runs: Iterable[tuple[int, int, int]], size: int) -> Iterator[list[tuple[int, int, int]]]:
    """Parts of tables, (number, start, stop), as lists of at most ``size`` rows together, in their order."""
    part: list[tuple[int, int, int]] = []
    room = size
    for number, start, stop in runs:
        while start < stop:
            end = min(stop, start + room)
            part.append((number, start, end))
            room -= end - start
            start = end
            if not room:
                yield part
                part, room = [], size
    if part:
        yield part
