"""From token states to one embedding a segment, over packed rows, in fp32.

Shape suffix legend: T = tokens of a row, L = tokens of it that this rank holds (all without context parallelism), S =
segments to pool, D = width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_grit.models.row_share import RowShare
from megatron_grit.parallel.collectives import sum_over_group

METHODS = ("mean", "weightedmean", "cls", "lasttoken")


def pool(
    states_LD: Tensor,
    pool_mask_T: Tensor,
    segment_ids_T: Tensor,
    num_segments: int,
    method: str,
    share: RowShare | None = None,
) -> Tensor:
    """Pool each segment's text.

    mean: average of the states whose mask is 1. weightedmean: weights 1, 2, 3 ... over those states, so that an
    instruction does not count (GRIT, arXiv 2402.09906; SGPT counts it, arXiv 2202.08904). cls: the segment's first
    state, instruction or not, as in GritLM. lasttoken: the last state whose mask is 1.

    Args:
        states_LD: final states of the row's tokens.
        pool_mask_T: 1 on text, 0 on instructions and padding.
        segment_ids_T: index of each token's segment; ``num_segments`` on padding.
        num_segments: S.
        method: one of :data:`METHODS`.
        share: which tokens ``states_LD`` is of, where not all; sums are then taken over the ranks that hold the rest.

    Returns:
        fp32 [S, D]. A segment without text pools to zero.
    """
    if method in ("cls", "lasttoken"):
        chosen = _chosen_position(pool_mask_T, segment_ids_T, num_segments, method)
        return states_LD.float()[chosen] if share is None else _state_of_any_rank(states_LD.float(), chosen, share)
    weights = pool_mask_T.float()
    if method == "weightedmean":
        weights = weights * _rank_in_segment(weights, segment_ids_T, num_segments)
    # Every rank has the masks of the whole row, so only the sums of states are exchanged.
    totals = weights.new_zeros(num_segments + 1).index_add(0, segment_ids_T, weights)
    if share is not None:
        weights, segment_ids_T = weights[share.index_L], segment_ids_T[share.index_L]
    states = states_LD.float() * weights[:, None]
    sums = states.new_zeros(num_segments + 1, states.shape[1]).index_add(0, segment_ids_T, states)
    if share is not None:
        sums = sum_over_group(sums, share.group)
    return (sums / totals.clamp(min=1e-9)[:, None])[:num_segments]


def _state_of_any_rank(states_LD: Tensor, chosen_S: Tensor, share: RowShare) -> Tensor:
    place_T = chosen_S.new_full((share.row_length,), -1)
    place_T[share.index_L] = torch.arange(len(share.index_L), device=chosen_S.device)
    place_S = place_T[chosen_S]
    own = states_LD[place_S.clamp(min=0)] * (place_S >= 0)[:, None]
    return sum_over_group(own, share.group)


def _rank_in_segment(mask_T: Tensor, segment_ids_T: Tensor, num_segments: int) -> Tensor:
    """1, 2, 3 ... over the masked tokens of each segment."""
    running = mask_T.cumsum(0)
    totals = mask_T.new_zeros(num_segments + 1).index_add(0, segment_ids_T, mask_T)
    before = totals.cumsum(0) - totals
    return running - before[segment_ids_T]


def _chosen_position(pool_mask_T: Tensor, segment_ids_T: Tensor, num_segments: int, method: str) -> Tensor:
    positions = torch.arange(len(segment_ids_T), device=segment_ids_T.device)
    if method == "cls":
        candidates, start, reduce = positions, len(positions) - 1, "amin"
    else:
        candidates, start, reduce = torch.where(pool_mask_T > 0, positions, 0), 0, "amax"
    chosen = positions.new_full((num_segments + 1,), start)
    return chosen.scatter_reduce(0, segment_ids_T, candidates, reduce)[:num_segments]


def normalize(embeddings_SD: Tensor) -> Tensor:
    """Divide each row by its L2 norm."""
    return F.normalize(embeddings_SD, dim=-1)
