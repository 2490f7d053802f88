"""How one token is drawn.

Each sequence has a generator of its own, so that what it draws does not depend on what else is computed with it. The
draw is made in the order of the vocabulary: probabilities whose last bits differ, as they do in other company, give
another token only where the random number falls between the two.

Shape suffix legend: V = vocabulary, S = tokens that a sequence holds.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_grit.config.options import SamplingOptions
from megatron_grit.data.order.permutation import derive_keys


class TokenSampler:
    """Draws the tokens of one sequence.

    Args:
        options: how.
        prompt: tokens that the answer follows.
        number: of the sequence among those of the same prompt. The first one draws by the seed itself, wherever it
            stands; the others draw otherwise.
    """

    def __init__(self, options: SamplingOptions, prompt: Sequence[int], number: int = 0) -> None:
        self.options = options
        seed = int(derive_keys(options.seed, number)) if number else options.seed
        self._generator = torch.Generator(device="cpu").manual_seed(seed)
        self._seen_S = torch.tensor(sorted(set(prompt)))

    def choose(self, logits_V: Tensor) -> int:
        """The next token: the most likely one, or a sample.

        Args:
            logits_V: fp32 on the CPU.
        """
        penalty = self.options.repetition_penalty
        if penalty != 1.0:
            logits_V = penalised(logits_V, self._seen_S, penalty)
        token = choose_token(logits_V, self.options, self._generator)
        if penalty != 1.0 and not bool((self._seen_S == token).any()):
            self._seen_S = torch.cat((self._seen_S, torch.tensor([token])))
        return token


def penalised(logits_V: Tensor, seen_S: Tensor, penalty: float) -> Tensor:
    """Logits with those of tokens that are there already divided by the penalty, or multiplied where they are negative
    (CTRL, arXiv 1909.05858, as transformers and vLLM compute it)."""
    scores, limits = logits_V[seen_S].double(), torch.finfo(logits_V.dtype)
    found = torch.where(scores < 0, scores * penalty, scores / penalty).clamp(limits.min, limits.max)
    return logits_V.index_copy(0, seen_S, found.to(logits_V.dtype))


def choose_token(logits_V: Tensor, options: SamplingOptions, generator: torch.Generator) -> int:
    """One token by ``temperature``, ``top_k`` and ``top_p`` (nucleus sampling, arXiv 1904.09751).

    Args:
        logits_V: fp32 on the CPU.
        options: of them the three.
        generator: source of randomness.
    """
    if options.temperature == 0:
        return int(logits_V.argmax())
    # Below 0: no quotient overflows, however small the temperature.
    scaled_V = (logits_V - logits_V.max()).double() / max(options.temperature, 1e-30)
    probabilities_V = scaled_V.softmax(-1)
    top_k = min(options.top_k or len(logits_V), len(logits_V))
    if top_k < len(logits_V) or options.top_p < 1.0:
        likely_K, order_K = probabilities_V.topk(top_k)
        likely_K = likely_K / likely_K.sum()
        outside_K = likely_K.cumsum(-1) - likely_K > options.top_p  # the first token is always inside
        kept_K = likely_K.masked_fill(outside_K, 0.0)
        probabilities_V = torch.zeros_like(probabilities_V).scatter_(0, order_K, kept_K)
    upto_V = probabilities_V.cumsum(-1)
    drawn = torch.rand((), dtype=torch.float64, generator=generator) * upto_V[-1]
    token = int(torch.searchsorted(upto_V, drawn, right=True))
    # The product may be rounded up to the total.
    return token if token < len(upto_V) else int(probabilities_V.nonzero()[-1])
