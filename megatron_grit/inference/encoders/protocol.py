"""What every embedder of texts has: ours, those of Hugging Face and of sentence-transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np

from megatron_grit.config.knob import Checked, knob
from megatron_grit.config.options import BatchSize
from megatron_grit.data.text.markers import Side
from megatron_grit.errors import NumericsError

if TYPE_CHECKING:
    from megatron_grit.inference.model_group import ModelGroup


@dataclass(frozen=True, kw_only=True)
class EmbedderOptions(Checked):
    """How texts are embedded."""

    pooling: Literal["auto", "mean", "mean_text", "cls"] = "auto"
    """Of a Hugging Face encoder: mean, mean_text, cls, or auto for what its modules.json says."""
    max_length: int = knob(256, at_least=1)
    """Tokens to which a text is cut, special tokens and prompt included."""
    batch_tokens: int = knob(BatchSize.batch_tokens, at_least=1)
    """Tokens of a forward pass, padding included; raised to the longest text."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """fp32, or bf16 for the matrix products."""
    query_instruction: str = knob("", text=True)
    """What our own models embed queries for; with a Hugging Face encoder the text in front of queries, in place of the
    prompt that its directory names."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto, cpu or cuda; under a launcher each process takes the GPU of its local rank."""


class Embedder(Protocol):
    """Texts to vectors. A vector does not depend, beyond rounding, on the texts that are embedded together with it."""

    dim: int
    """Channels of a vector."""
    fingerprint: str
    """Of everything that a passage's vector follows from, weights included, but not of the machine or of
    ``batch_tokens``, which change the last digits."""
    sides_alike: bool
    """Whether a text has one vector as a query and as a passage."""
    model_group: ModelGroup | None
    """The processes that hold this embedder together: all of them call :meth:`embed` with the same texts, and each gets
    all vectors. None: this process holds all of it."""

    def embed(self, texts: Sequence[str], side: Side = "passage") -> np.ndarray:
        """Vectors of texts, float32 [len(texts), dim], finite.

        Raises:
            DataError: a text that has no token.
            NumericsError: a vector is not finite; names the text.
        """
        ...


def finite(vectors_ND: np.ndarray, texts: Sequence[str]) -> np.ndarray:
    """The vectors, if they are finite.

    Raises:
        NumericsError: one is not; names its text.
    """
    bad = np.flatnonzero(~np.isfinite(vectors_ND).all(axis=1))
    if len(bad):
        raise NumericsError(f"{len(bad)} vectors are not finite; the first is of the text {texts[int(bad[0])][:80]!r}")
    return vectors_ND
