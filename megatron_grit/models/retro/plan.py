"""Which tokens of a row read which neighbor tokens, and which tokens of the row those were retrieved for.

A chunk's neighbors are known when its last token is: they are retrieved with all of it. So they are read from its last
token on, up to the last but one of the next chunk, which has neighbors of its own from there: the tokens that read
together are a group, shifted against its chunk by its length less one. The last chunk of a segment is read by its last
token only. Tokens before the end of the first chunk read nothing, and neither does the group of a chunk without
neighbors.

Shape suffix legend: T = tokens of a row, C = chunks, k = neighbors of a chunk, U = texts, N = tokens of all texts,
G = groups, Q = queries of a group, K = keys of a group.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_grit.config.schema.retro import RetroConfig
from megatron_grit.data.rows.batch import to_device
from megatron_grit.data.rows.neighbors import Neighbors
from megatron_grit.models.attention import AttentionMode, PackedSegments


@dataclass(frozen=True)
class Groups:
    """Queries and keys of attention between two sequences, in groups of unequal sizes.

    Every group has a key. A query is in one group or in none.
    """

    query_index_GQ: Tensor
    """int64: place of each query in its sequence; 0 where a group has fewer."""
    place_of_query: Tensor
    """int64, one for each token of the queries' sequence: its place among the G x Q; G x Q where it is in no group."""
    key_index_GK: Tensor
    """int64: place of each key in its sequence; 0 where a group has fewer."""
    key_mask_GK: Tensor
    """bool: whether there is such a key."""

    @property
    def has_query(self) -> Tensor:
        """bool, one for each token of the queries' sequence: whether it attends to anything."""
        return self.place_of_query < self.query_index_GQ.numel()


@dataclass(frozen=True, kw_only=True)
class EncodingPlan:
    """How neighbors are encoded, on the device of the model."""

    conditioning: Groups | None
    """Tokens of neighbors attend to the chunk that they were retrieved for. None: they do not."""
    texts: PackedSegments
    """The neighbors as a packed row; attention inside each is bidirectional."""
    positions_N: Tensor
    """int64 [N]; restart at 0 in each text."""


@dataclass(frozen=True, kw_only=True)
class NeighborPlan(EncodingPlan):
    """How a row and its neighbors attend to each other."""

    reading: Groups
    """Tokens of the row attend to neighbors."""


@dataclass
class RetroSegments(PackedSegments):
    """Segments of a row with what they read."""

    plan: NeighborPlan | None = None


def plan_of(neighbors: Neighbors, row_length: int, retro: RetroConfig, device: torch.device) -> NeighborPlan | None:
    """The plan of a row. None: no chunk of it has a neighbor.

    Args:
        neighbors: the row's. Where the encoder is conditioned, each text belongs to one chunk.
        row_length: T.
        retro: of the model.
        device: where the model computes.
    """
    used = np.flatnonzero((neighbors.text_of_Ck >= 0).any(1))
    if not len(used):
        return None
    ends_U = np.cumsum(neighbors.lengths_U)
    starts_U = ends_U - neighbors.lengths_U
    num_tokens = neighbors.tokens_1N.shape[1]

    def tokens_of(chunk: int) -> np.ndarray:
        texts = neighbors.text_of_Ck[chunk]
        return np.concatenate([np.arange(starts_U[text], ends_U[text]) for text in texts[texts >= 0]])

    read = [tokens_of(chunk) for chunk in used]
    readers = [_group(neighbors, chunk) for chunk in used]
    chunks = [np.arange(*neighbors.chunk_bounds_C2[chunk]) for chunk in used]
    if retro.parity == "core":  # a row of zeros comes after the last token
        chunks = [np.pad(chunk, (0, retro.chunk_length - len(chunk)), constant_values=row_length) for chunk in chunks]
    lengths = neighbors.lengths_U.tolist()
    if num_tokens > ends_U[-1]:
        lengths.append(num_tokens - int(ends_U[-1]))  # padding
    bounds = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    return NeighborPlan(
        reading=_groups(readers, read, row_length, device),
        conditioning=_groups(read, chunks, num_tokens, device) if retro.encoder_conditioning == "chunk" else None,
        texts=PackedSegments.of_row(
            to_device(bounds, device), max(lengths), AttentionMode.BIDIRECTIONAL, lengths=lengths
        ),
        positions_N=to_device(torch.cat([torch.arange(length) for length in lengths]), device),
    )


def encoding_plan(
    lengths: list[int], read: list[np.ndarray], asked: list[np.ndarray] | None, device: torch.device
) -> EncodingPlan:
    """How some texts are encoded.

    Args:
        lengths: of the texts.
        read: places of tokens of texts, in groups.
        asked: what each group is conditioned on: places in another sequence. None: nothing.
        device: where the model computes.
    """
    bounds = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    return EncodingPlan(
        conditioning=None if asked is None else _groups(read, asked, sum(lengths), device),
        texts=PackedSegments.of_row(
            to_device(bounds, device), max(lengths), AttentionMode.BIDIRECTIONAL, lengths=lengths
        ),
        positions_N=to_device(torch.cat([torch.arange(length) for length in lengths]), device),
    )


def _group(neighbors: Neighbors, chunk: int) -> np.ndarray:
    """Tokens of the row that read a chunk's neighbors."""
    segment_end, chunk_end = neighbors.segment_ends_C[chunk], neighbors.chunk_bounds_C2[chunk, 1]
    if chunk_end == segment_end:
        return np.array([segment_end - 1])
    return np.arange(chunk_end - 1, neighbors.chunk_bounds_C2[chunk + 1, 1] - 1)


def _groups(queries: list[np.ndarray], keys: list[np.ndarray], num_queries: int, device: torch.device) -> Groups:
    query_index_GQ, query_mask_GQ = _padded(queries)
    key_index_GK, key_mask_GK = _padded(keys)
    place = np.full(num_queries, query_index_GQ.size, dtype=np.int64)
    place[query_index_GQ[query_mask_GQ]] = np.flatnonzero(query_mask_GQ)
    arrays = (query_index_GQ, place, key_index_GK, key_mask_GK)
    return Groups(*(to_device(torch.from_numpy(array), device) for array in arrays))


def _padded(lists: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.array([len(one) for one in lists])
    mask = np.arange(lengths.max()) < lengths[:, None]
    index = np.zeros(mask.shape, dtype=np.int64)
    index[mask] = np.concatenate(lists)
    return index, mask
