"""Vectors of a request's texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from megatron_grit.config.options import EmbeddingOptions
from megatron_grit.inference.model import GritModel
from megatron_grit.serving.fields import check_tokens


def embed(
    model: GritModel,
    texts: Sequence[str | list[int]],
    options: EmbeddingOptions,
    most_tokens: int,
    before_pass: Callable[[], None] | None,
) -> tuple[np.ndarray, int]:
    """Vectors of texts, float32 [texts, dimensions], and how many tokens they have.

    Args:
        model: the model.
        texts: each a string or the ids of its tokens.
        options: how.
        most_tokens: that one request may have.
        before_pass: called before each forward pass; what it raises ends the call.

    Raises:
        RequestError: these are too many.
    """
    tokenised = model.embedding_tokens(texts, options.instruction, side=options.side, max_length=options.max_length)
    num_tokens = sum(len(head) + len(tail) for head, tail in tokenised)
    check_tokens(num_tokens, most_tokens)
    return model.embed_tokens(tokenised, options, progress=False, before_pass=before_pass), num_tokens
