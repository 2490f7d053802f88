"""Which tokens of a row read which neighbor tokens, and which tokens of the row those were retrieved for.

A chunk's neighbors are known when its last token is: they are retrieved with all of it. So they are read from its last
token on, up to the last but one of the next chunk, which has neighbors of its own from there: the tokens that read
together are a group, shifted against its chunk by its length less one. The last chunk of a segment is read by its last
token only. Tokens before the end of the first chunk read nothing, and neither does the group of a chunk without
neighbors.

A context parallel rank encodes the texts that its own tokens read, so what is read stays on the rank. Only where
neighbors are conditioned on their chunk, keys come from other ranks: a chunk ends where its readers begin, and may lie
on two ranks.

Shape suffix legend: T = tokens of a row, L = tokens that a rank holds, C = chunks, k = neighbors of a chunk, U = texts,
N = tokens of all texts, G = groups, Q = queries of a group, K = keys of a group.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_grit.config.schema.retro import RetroConfig
from megatron_grit.data.rows.batch import to_device
from megatron_grit.data.rows.neighbors import Neighbors
from megatron_grit.models.attention import AttentionMode, PackedSegments
from megatron_grit.models.row_share import RowShare, gathered_places


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
    key_group: dist.ProcessGroup | None = None
    """The ranks over which keys are gathered; the places of keys are those among the gathered ones, in the order of
    ranks. None: keys are this rank's."""

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


def held_neighbors(neighbors: Neighbors, share: RowShare) -> Neighbors:
    """Copy with the texts that the tokens of a context parallel rank read, and no others.

    Texts whose readers lie on several ranks are encoded on each of them. A rank whose tokens read nothing keeps the
    texts of one chunk: it takes part in the exchange of what they are conditioned on, and in that of gradients.

    Args:
        neighbors: of the whole row.
        share: the part of the row that the rank holds.
    """
    used = _chunks_with_texts(neighbors)
    kept = [chunk for chunk in used if len(_readers(neighbors, chunk, share))] or used[:1]
    text_of_Ck = np.full_like(neighbors.text_of_Ck, -1)
    text_of_Ck[kept] = neighbors.text_of_Ck[kept]
    texts = np.unique(text_of_Ck[text_of_Ck >= 0])
    places = _token_places(neighbors)
    tokens = np.concatenate([np.arange(0), *(places[text] for text in texts)])
    device = neighbors.tokens_1N.device
    return replace(
        neighbors,
        text_of_Ck=np.where(text_of_Ck >= 0, np.searchsorted(texts, text_of_Ck), -1),
        lengths_U=neighbors.lengths_U[texts],
        tokens_1N=neighbors.tokens_1N[:, to_device(torch.from_numpy(tokens), device)],
    )


def plan_of(
    neighbors: Neighbors, row_length: int, retro: RetroConfig, device: torch.device, share: RowShare | None = None
) -> NeighborPlan | None:
    """The plan of a row. None: no chunk of it has a neighbor.

    Args:
        neighbors: the row's, or what :func:`held_neighbors` leaves of them. Where the encoder is conditioned, each
            text belongs to one chunk.
        row_length: T, of the whole row.
        retro: of the model.
        device: where the model computes.
        share: the part of the row that this rank holds. None: all of it.
    """
    used = _chunks_with_texts(neighbors)
    if not used:
        return None
    places, num_tokens = _token_places(neighbors), neighbors.tokens_1N.shape[1]
    read = [np.concatenate([places[text] for text in neighbors.text_of_Ck[chunk] if text >= 0]) for chunk in used]
    readers = [_readers(neighbors, chunk, share) for chunk in used]
    chunks = [np.arange(*neighbors.chunk_bounds_C2[chunk]) for chunk in used]
    if retro.parity == "core":  # a row of zeros comes after the last token
        chunks = [np.pad(chunk, (0, retro.chunk_length - len(chunk)), constant_values=row_length) for chunk in chunks]
    num_held = row_length
    if share is not None:
        gathered_T = gathered_places(row_length, share.size).numpy()
        chunks = [gathered_T[chunk] for chunk in chunks]
        num_held = row_length // share.size
    asked = chunks if retro.encoder_conditioning == "chunk" else None
    lengths = neighbors.lengths_U.tolist()
    if num_tokens > sum(lengths):
        lengths.append(num_tokens - sum(lengths))  # padding
    encoding = encoding_plan(lengths, read, asked, device, None if share is None else share.group)
    return NeighborPlan(**vars(encoding), reading=_groups(readers, read, num_held, device))


def encoding_plan(
    lengths: list[int],
    read: list[np.ndarray],
    asked: list[np.ndarray] | None,
    device: torch.device,
    key_group: dist.ProcessGroup | None = None,
) -> EncodingPlan:
    """How some texts are encoded.

    Args:
        lengths: of the texts.
        read: places of tokens of texts, in groups.
        asked: what each group is conditioned on: places in another sequence. None: nothing.
        device: where the model computes.
        key_group: of :class:`Groups`, for ``asked``.
    """
    bounds = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    return EncodingPlan(
        conditioning=None
        if asked is None
        else replace(_groups(read, asked, sum(lengths), device), key_group=key_group),
        texts=PackedSegments.of_row(
            to_device(bounds, device), max(lengths), AttentionMode.BIDIRECTIONAL, lengths=lengths
        ),
        positions_N=to_device(torch.cat([torch.arange(length) for length in lengths]), device),
    )


def _chunks_with_texts(neighbors: Neighbors) -> list[int]:
    chunks: list[int] = np.flatnonzero((neighbors.text_of_Ck >= 0).any(1)).tolist()
    return chunks


def _token_places(neighbors: Neighbors) -> list[np.ndarray]:
    """For each text the places of its tokens among those of all texts."""
    return np.split(np.arange(neighbors.lengths_U.sum()), neighbors.lengths_U.cumsum()[:-1])


def _readers(neighbors: Neighbors, chunk: int, share: RowShare | None) -> np.ndarray:
    """Places of the tokens that read a chunk's neighbors: in the row, or among those that a rank holds of it."""
    group = _group(neighbors, chunk)
    if share is None:
        return group
    held = share.places[group]
    return held[held >= 0]


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
    query_index, place_of_query, key_index, key_mask = (to_device(torch.from_numpy(array), device) for array in arrays)
    return Groups(query_index, place_of_query, key_index, key_mask)


def _padded(lists: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.array([len(one) for one in lists])
    mask = np.arange(max(1, lengths.max())) < lengths[:, None]
    index = np.zeros(mask.shape, dtype=np.int64)
    index[mask] = np.concatenate(lists)
    return index, mask
