"""Segments: the stretches of records that rows are made of, and what becomes of those that are too long."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_grit.data.order.sources import Sources
from megatron_grit.data.text.markers import NO_MARKERS, TextMarkers
from megatron_grit.errors import DataError

OverLong = Literal["stop", "drop", "truncate", "split"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """What attends to itself: a query or passage with its instruction, a text, a conversation, or a piece of one."""

    sources: Sources
    source: int
    record: int
    start: int
    """First token of the record that belongs to it."""
    stop: int
    roles: list[int]
    """Role of each of its spans."""
    lengths: list[int]
    """Tokens of each of its spans; their sum is ``stop - start`` and what ``rest`` has."""
    num_labels: int = 0
    """Tokens that are labels of the next-token loss."""
    label_weight: float = 0.0
    """Sum of their weights."""
    markers: TextMarkers = NO_MARKERS
    """Of a query or passage: what is put around its last span, the text."""
    rest: Segment | None = None
    """What follows it as a part of it: a stretch of another record. Its spans are among those of this one."""

    @property
    def length(self) -> int:
        """Tokens, markers and the rest included."""
        return self.stop - self.start + self.markers.num_tokens + (0 if self.rest is None else self.rest.length)

    @property
    def name(self) -> str:
        """Name of its record: "prefix#index"."""
        return f"{self.sources.names[self.source]}#{self.record}"


def ranges(length: int, limit: int, policy: OverLong, multiple: int = 1) -> list[tuple[int, int]]:
    """Ranges of a record's tokens that become segments.

    Pieces of a split record overlap by one token: the first token of a segment has nothing to be predicted from, so it
    is a label in the piece before.

    Args:
        length: tokens of the record.
        limit: most tokens of a segment, at least 2.
        policy: what to do with a longer record; "stop" leaves it as it is, for the caller to refuse.
        multiple: pieces begin at multiples of it, which is below ``limit``.
    """
    if length <= limit or policy == "stop":
        return [(0, length)]
    if policy == "drop":
        return []
    if policy == "truncate":
        return [(0, limit)]
    step = (limit - 1) // multiple * multiple
    return [(start, min(start + step + 1, length)) for start in range(0, length - 1, step)]


def spans_between(roles: list[int], lengths: list[int], start: int, stop: int) -> tuple[list[int], list[int]]:
    """Roles and lengths of the spans of tokens ``start`` to ``stop - 1``."""
    kept_roles, kept_lengths, end = [], [], 0
    for role, length in zip(roles, lengths, strict=True):
        begin, end = end, end + length
        overlap = min(end, stop) - max(begin, start)
        if overlap > 0:
            kept_roles.append(role)
            kept_lengths.append(overlap)
    return kept_roles, kept_lengths


def too_long(sources: Sources, source: int, record: int, length: int) -> DataError:
    """The error of a record that the policy "stop" refuses."""
    return DataError(
        f"record {sources.names[source]}#{record} has a segment of {length} tokens, more than data.tokens_per_row or "
        f"model.max_position_embeddings, {sources.longest_segment}; build the file again with a lower limit, or set "
        f"{sources.rules.policy_key}"
    )
