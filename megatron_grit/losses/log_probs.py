"""Log-probabilities of whole answers, from the losses of their tokens.

Shape suffix legend: T = tokens of a packed row, S = segments of it.
"""

from __future__ import annotations

import torch
from torch import Tensor


def segment_sums(values_T: Tensor, mask_T: Tensor, segment_ids_T: Tensor, num_segments: int) -> Tensor:
    """Sums over the tokens of each segment.

    They are added up in float64: the log-probability of an answer of a thousand tokens has steps of 6e-5 in fp32, as
    large as the differences between two models that preferences are about.

    Args:
        values_T: of each token; where the mask is 0 they may be anything, infinite too.
        mask_T: weight of each token; None of the padding's.
        segment_ids_T: int64, segment of each token; ``num_segments`` on padding.
        num_segments: S.

    Returns:
        float64 [S].
    """
    shares_T = torch.where(mask_T > 0, values_T.double() * mask_T.double(), 0.0)
    return shares_T.new_zeros(num_segments + 1).index_add(0, segment_ids_T, shares_T)[:num_segments]
