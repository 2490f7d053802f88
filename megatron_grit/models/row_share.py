"""Context parallelism over packed rows: which tokens of a row a rank holds, and which keys they attend to.

A row of T tokens is split into 2C equal parts, C being the context parallel size, and rank r holds parts r and
2C - 1 - r: late tokens attend to more keys than early ones in a causal pass, so every rank gets both (Llama 3,
arXiv 2407.21783, section 3.3.2). Keys and values are gathered over the ranks. A piece is the overlap of a part and a
segment; its queries attend to one range of the gathered keys. In a causal pass this range ends where the piece ends.

Shape suffix legend: T = tokens of a row, L = tokens that a rank holds, P = pieces, K = keys of all pieces, S = segments
of the row.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_grit.data.rows.batch import PackedRow, to_device
from megatron_grit.parallel.context import ParallelContext


@dataclass(frozen=True)
class Pieces:
    """The attention of one rank, piece by piece."""

    cu_queries: Tensor
    """int32 [P + 1]: bounds of the pieces among the rank's tokens."""
    cu_keys: Tensor
    """int32 [P + 1]: bounds of the pieces' keys."""
    key_index_K: Tensor
    """int64 [K]: index of each key among the gathered ones, which are in the order of ranks."""
    query_lengths: list[int]
    key_lengths: list[int]


@dataclass(frozen=True)
class RowShare:
    """The part of a row that this context parallel rank holds."""

    index_L: Tensor
    """int64 [L]: positions in the row, in the order in which the rank holds them."""
    row_length: int
    rank: int
    size: int
    group: dist.ProcessGroup

    @staticmethod
    def of_row(row: PackedRow, context: ParallelContext) -> RowShare | None:
        """This rank's share of a row. None without context parallelism."""
        if context.context_size == 1:
            return None
        length = row.tokens_1T.shape[1]
        held = held_positions(length, context.context_rank, context.context_size)
        index = to_device(held, row.tokens_1T.device)
        return RowShare(index, length, context.context_rank, context.context_size, context.context_group)

    def take(self, row: PackedRow) -> PackedRow:
        """The tokens that this rank holds, with labels and masks. Segment boundaries stay those of the whole row."""
        index = self.index_L
        return replace(
            row,
            tokens_1T=row.tokens_1T[:, index],
            positions_1T=row.positions_1T[:, index],
            padding_mask_1T=row.padding_mask_1T[:, index],
            labels_1T=None if row.labels_1T is None else row.labels_1T[:, index],
            loss_mask_1T=None if row.loss_mask_1T is None else row.loss_mask_1T[:, index],
            label_index_L=None,
            teacher=None if row.teacher is None else row.teacher.take(index),
        )

    @cached_property
    def places(self) -> np.ndarray:
        """Index among the rank's tokens of each position of the row: int64 [T]; -1 where another rank holds it."""
        places = np.full(self.row_length, -1, dtype=np.int64)
        held = held_positions(self.row_length, self.rank, self.size).numpy()
        places[held] = np.arange(len(held))
        return places

    def pieces(self, lengths: list[int], causal: bool) -> Pieces:
        """What the rank's tokens attend to.

        Args:
            lengths: of the segments of the whole row.
            causal: whether keys after a query are left out.
        """
        bounds = list(itertools.accumulate(lengths, initial=0))
        part = self.row_length // (2 * self.size)
        query_lengths, key_lengths, keys = [], [], []
        for number in (self.rank, 2 * self.size - 1 - self.rank):
            begin, end = number * part, (number + 1) * part
            for first, last in zip(bounds[:-1], bounds[1:], strict=True):
                if max(begin, first) >= min(end, last):
                    continue
                stop = min(end, last) if causal else last
                query_lengths.append(min(end, last) - max(begin, first))
                key_lengths.append(stop - first)
                keys.append(torch.arange(first, stop))
        device = self.index_L.device
        places = gathered_places(self.row_length, self.size)
        return Pieces(
            cu_queries=to_device(_ends(query_lengths), device),
            cu_keys=to_device(_ends(key_lengths), device),
            key_index_K=to_device(places[torch.cat(keys)], device),
            query_lengths=query_lengths,
            key_lengths=key_lengths,
        )


def held_positions(row_length: int, rank: int, size: int) -> Tensor:
    """Positions in the row of the tokens that a context parallel rank holds: int64 [row_length / size]."""
    if row_length % (2 * size):
        raise ValueError(f"a row of {row_length} tokens does not divide into {2 * size} equal parts")
    parts = torch.arange(row_length).view(2 * size, -1)
    return torch.cat([parts[rank], parts[2 * size - 1 - rank]])


def gathered_places(row_length: int, size: int) -> Tensor:
    """Index of each position of the row among the gathered tokens, which are in the order of ranks: int64 [T]."""
    order = torch.cat([held_positions(row_length, rank, size) for rank in range(size)])
    return torch.argsort(order)


def _ends(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
