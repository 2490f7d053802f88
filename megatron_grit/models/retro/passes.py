"""Reading in passes of generation, each of which holds the next tokens of several sequences.

What a sequence needs of its earlier passes is kept in a cache: for each layer that reads, keys and values of the
neighbors that it read last, which are encoded once, and, where neighbors are conditioned on their chunk, the states of
the first such layer that they are conditioned on.

Shape suffix legend: L = new tokens of a sequence, K = tokens of it so far, or of neighbors, D = width, J = key-value
heads, H = channels of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from megatron_grit.data.rows.neighbors import Neighbors
from megatron_grit.models.attention import KeyValueCache, PackedSegments
from megatron_grit.models.retro.plan import EncodingPlan, encoding_plan


class NeighborCache(KeyValueCache, Protocol):
    """What reading needs of earlier passes of each segment, beside their keys and values."""

    def extend_states(self, segment: int, states_LD: Tensor) -> Tensor:
        """Append the states that neighbors of a segment are conditioned on; return all of them, [K, D]."""
        ...

    def keep_neighbors(self, layer_number: int, segment: int, key_value_KJH: Tensor | None) -> None:
        """Keep keys and values, side by side in the last dimension, of what a segment reads from now on."""
        ...

    def kept_neighbors(self, layer_number: int, segment: int) -> Tensor | None:
        """What was kept last. None: the segment reads nothing."""
        ...

    def has_encoding(self, text: bytes) -> bool:
        """Whether a text was encoded, and its encoding is kept."""
        ...

    def join_encodings(self, texts: list[bytes], encoded: dict[bytes, Tensor]) -> Tensor:
        """Keep the encodings of some texts; return those of several one after another."""
        ...


class Read(NamedTuple):
    """Tokens of a segment that read the same neighbors."""

    segment: int
    tokens: range
    """Of the pass."""
    texts: range | None
    """Tokens of new neighbors. None: what the segment read last."""


class Chunk(NamedTuple):
    """What new neighbors are conditioned on: tokens of a segment, counted from its end backwards."""

    segment: int
    before_end: range


@dataclass(frozen=True)
class PassPlan:
    """What the tokens of a pass read."""

    reads: list[Read]
    """In the order of tokens; first what the segment read last, where it has tokens before the first new neighbors."""
    chunks: list[Chunk]
    """Of new neighbors, where they are conditioned."""
    encoding: EncodingPlan | None
    """None: nothing is encoded."""
    tokens_1N: Tensor
    """int64 [1, N]: of the texts that are encoded."""
    texts: list[bytes]
    """Tokens of all new neighbors, where they are not conditioned: such a text is encoded once in all passes."""
    encoded: list[bytes]
    """Of these the ones that are encoded."""

    def parts(self, states: Tensor | None) -> dict[bytes, Tensor]:
        """The states of each text that is encoded, of those of all."""
        if states is None or self.encoding is None:
            return {}
        return dict(zip(self.encoded, states.split(self.encoding.texts.lengths), strict=True))


@dataclass
class PassSegments(PackedSegments):
    """Segments of a pass with what they read."""

    plan: PassPlan | None = None
    cache: NeighborCache | None = None


def pass_plan(neighbors: Neighbors, lengths: list[int], conditioned: bool, cache: NeighborCache) -> PassPlan:
    """The plan of a pass.

    Args:
        neighbors: that are new. A chunk ends in the pass, and may begin before it. Texts lie in the order of chunks.
        lengths: tokens of each segment of the pass.
        conditioned: whether neighbors are conditioned on their chunk.
        cache: what earlier passes have encoded.
    """
    reads, chunks, begin, text_end, number = [], [], 0, 0, 0
    for segment, length in enumerate(lengths):
        end, at, texts = begin + length, begin, None
        while number < len(neighbors.segment_ends_C) and neighbors.segment_ends_C[number] == end:
            start, stop = neighbors.chunk_bounds_C2[number].tolist()
            reads.append(Read(segment, range(at, stop - 1), texts))
            found = neighbors.text_of_Ck[number]
            size = int(neighbors.lengths_U[found[found >= 0]].sum())
            at, texts, text_end = stop - 1, range(text_end, text_end + size), text_end + size
            if size:
                chunks.append(Chunk(segment, range(end - start, end - stop, -1)))
            number += 1
        reads.append(Read(segment, range(at, end), texts))
        begin = end
    tokens_1N, sizes, device = neighbors.tokens_1N, neighbors.lengths_U.tolist(), neighbors.tokens_1N.device
    if not chunks:
        return PassPlan(reads, [], None, tokens_1N, [], [])
    if conditioned:
        ends = np.cumsum([len(chunk.before_end) for chunk in chunks])
        asked = np.split(np.arange(ends[-1]), ends[:-1])
        read = [np.arange(part.texts.start, part.texts.stop) for part in reads if part.texts]
        return PassPlan(reads, chunks, encoding_plan(sizes, read, asked, device), tokens_1N, [], [])
    parts = tokens_1N[0].split(sizes)
    names = [part.cpu().numpy().tobytes() for part in parts]
    unknown = {name: part for name, part in zip(names, parts, strict=True) if not cache.has_encoding(name)}
    if not unknown:
        return PassPlan(reads, [], None, tokens_1N, names, [])
    plan = encoding_plan([len(part) for part in unknown.values()], [], None, device)
    return PassPlan(reads, [], plan, torch.cat(list(unknown.values()))[None], names, list(unknown))
