"""The loss of reward models: a Bradley-Terry model of which answer of a pair is preferred.

Shape suffix legend: P = pairs.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def bradley_terry(chosen_P: Tensor, rejected_P: Tensor, *, margin: float = 0.0, centering: float = 0.0) -> Tensor:
    """-log s(r+ - r- - m) + c (r+ + r-)^2 of each pair, where r+ and r- are the rewards of its two answers.

    The first term is the negative log-probability that the Bradley-Terry model gives to the preference (arXiv
    2203.02155, equation 1), with a margin as in Llama 2 (arXiv 2307.09288, equation 2), here one for all pairs. It
    depends on differences alone; the second term keeps rewards around zero (arXiv 2312.09244, section 2).

    Args:
        chosen_P: rewards of the preferred answers.
        rejected_P: rewards of the other ones.
        margin: m.
        centering: c.

    Returns:
        [P], none divided by their number.
    """
    losses_P = -F.logsigmoid(chosen_P - rejected_P - margin)
    return losses_P + centering * (chosen_P + rejected_P).square() if centering else losses_P
