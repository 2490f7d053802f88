"""How many keys a context parallel rank holds of a row: arithmetic of models/row_share.py, without torch."""

from __future__ import annotations

from math import ceil


def gathered_keys(row_tokens: int, segment_tokens: float, size: int, causal: bool) -> int:
    """Keys that a rank selects from the gathered ones for its queries: the maximum over ranks.

    The row is split into 2 x ``size`` equal parts, two for each rank. The queries of a part attend to all keys of their
    segments, in a causal pass up to the end of the part. A segment that overlaps both parts counts twice.

    Args:
        row_tokens: length of the row.
        segment_tokens: length of its segments, assumed equal.
        size: context parallel size. 1: nothing is gathered.
        causal: whether keys after a query are left out.
    """
    if size == 1 or not row_tokens:
        return 0
    part = row_tokens / (2 * size)

    def of_part(number: int) -> float:
        begin, end = number * part, (number + 1) * part
        first, keys = begin // segment_tokens * segment_tokens, 0.0
        while first < end:
            last = min(first + segment_tokens, row_tokens)
            keys += (min(end, last) if causal else last) - first
            first += segment_tokens
        return keys

    return ceil(max(of_part(rank) + of_part(2 * size - 1 - rank) for rank in range(size)))
