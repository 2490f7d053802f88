"""From token states to one embedding a segment, over packed rows, in fp32.

Shape suffix legend: T = tokens of a row, L = tokens of it that this rank holds (all without context parallelism), S =
segments to pool, D = width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_grit.models.row_share import RowShare
from megatron_grit.parallel.collectives import max_over_group, sum_over_group

METHODS = ("mean", "weightedmean", "weightedmean_sgpt", "learnedmean", "max", "cls", "lasttoken")


class PositionWeights(torch.nn.Module):
    """The weights of learnedmean: one for each position in a segment, all 1 at first."""

    def __init__(self, num_positions: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(num_positions, dtype=dtype, device=device))


def pool(
    states_LD: Tensor,
    pool_mask_T: Tensor,
    segment_ids_T: Tensor,
    num_segments: int,
    method: str,
    share: RowShare | None = None,
    position_weights: Tensor | None = None,
) -> Tensor:
    """Pool each segment's text.

    With h the states whose mask is 1 and p their positions in the segment, the first token's being 1:

    mean: sum h / n. weightedmean: sum i h / sum i, where i numbers those states 1, 2, 3 ..., so that an instruction
    does not count (GRIT, arXiv 2402.09906). weightedmean_sgpt: sum p h / sum p, where it does (SGPT, arXiv 2202.08904,
    equation 2). learnedmean: sum w_p h / sum w_p. max: of each channel; states that share it share the gradient. cls:
    the segment's first state, instruction or not, as in GritLM. lasttoken: the last state whose mask is 1.

    Args:
        states_LD: final states of the row's tokens.
        pool_mask_T: 1 on text, 0 on instructions and padding.
        segment_ids_T: index of each token's segment; ``num_segments`` on padding.
        num_segments: S.
        method: one of :data:`METHODS`.
        share: which tokens ``states_LD`` is of, where not all; sums are then taken over the ranks that hold the rest.
        position_weights: w of learnedmean: at least as many as the longest segment has tokens.

    Returns:
        fp32 [S, D]. A segment without text pools to zero.
    """
    if method in ("cls", "lasttoken"):
        chosen = _chosen_position(pool_mask_T, segment_ids_T, num_segments, method)
        return states_LD.float()[chosen] if share is None else _state_of_any_rank(states_LD.float(), chosen, share)
    weights = pool_mask_T.float()
    if method == "weightedmean":
        weights = weights * _rank_in_segment(weights, segment_ids_T, num_segments)
    elif method in ("weightedmean_sgpt", "learnedmean"):
        positions = _rank_in_segment(torch.ones_like(weights), segment_ids_T, num_segments)
        if method == "learnedmean":
            assert position_weights is not None
            # Padding may be longer than any segment.
            positions = position_weights.float()[(positions.long() - 1).clamp(max=len(position_weights) - 1)]
        weights = weights * positions
    if share is not None:
        weights, segment_ids_T = weights[share.index_L], segment_ids_T[share.index_L]
    if method == "max":
        return _maxima(states_LD.float(), weights > 0, segment_ids_T, num_segments, share)
    # The sum of weights is taken over ranks as the states' is, so that each has the gradient of its own weights.
    sums, totals = _segment_sums(
        (states_LD.float() * weights[:, None], weights[:, None]), segment_ids_T, num_segments, share
    )
    return sums / totals.clamp(min=1e-9)


def _segment_sums(
    values: tuple[Tensor, ...], segment_ids_L: Tensor, num_segments: int, share: RowShare | None
) -> tuple[Tensor, ...]:
    """Sums over each segment's tokens, on all ranks: [S, D] for each [L, D]."""
    joined = torch.cat(values, 1)
    sums = joined.new_zeros(num_segments + 1, joined.shape[1]).index_add(0, segment_ids_L, joined)
    if share is not None:
        sums = sum_over_group(sums, share.group)
    return sums[:num_segments].split([value.shape[1] for value in values], 1)


def _maxima(
    states_LD: Tensor, chosen_L: Tensor, segment_ids_L: Tensor, num_segments: int, share: RowShare | None
) -> Tensor:
    index_LD = segment_ids_L[:, None].expand_as(states_LD)
    with torch.no_grad():
        lowest = torch.finfo(states_LD.dtype).min
        candidates_LD = states_LD.masked_fill(~chosen_L[:, None], lowest)
        largest = states_LD.new_full((num_segments + 1, states_LD.shape[1]), lowest)
        largest = largest.scatter_reduce(0, index_LD, candidates_LD, "amax")
        if share is not None:
            largest = max_over_group(largest, share.group)
        hits_LD = ((states_LD == largest[segment_ids_L]) & chosen_L[:, None]).float()
    sums, counts = _segment_sums((states_LD * hits_LD, hits_LD), segment_ids_L, num_segments, share)
    return sums / counts.clamp(min=1)


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
