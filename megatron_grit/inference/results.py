"""What a model gives: vectors of texts, and answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from megatron_grit.inference.reading import Reading


class Embeddings(NamedTuple):
    """Vectors of texts, float32 [texts, dimensions], and how many tokens were read for them."""

    vectors: np.ndarray
    num_tokens: int
    num_cut: int = 0
    """Texts that were longer than ``max_length`` or the model's positions, and were cut."""


class Answer(NamedTuple):
    """An answer, why it ends, and the tokens of the prompt and of the answer."""

    text: str
    finish_reason: str
    num_prompt_tokens: int
    num_tokens: int
    readings: Sequence[Reading] = ()
    """What was read, by a model that reads neighbors."""
    prompt_token_ids: Sequence[int] = ()
    token_ids: Sequence[int] = ()
    """Of the answer, the token that ended it included."""
    log_probs: Sequence[float] = ()
    """Of ``token_ids`` under the model, before repetition_penalty, temperature, top_p and top_k."""
