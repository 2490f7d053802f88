"""Pooling and what lies on top of the decoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_grit.config.knob import knob


@dataclass(kw_only=True)
class EmbeddingConfig:
    """How token states become one embedding."""

    pooling: Literal["mean", "weightedmean", "weightedmean_sgpt", "learnedmean", "max", "cls", "lasttoken"] = "mean"
    """Which states of the text are averaged; the instruction is attended and never pooled. weightedmean: weights 1, 2,
    3 ... over the text (GRIT). weightedmean_sgpt: each state's position in its segment, instruction counted (SGPT).
    learnedmean: a trained weight for each position in the segment, 1 at first. max: of each channel."""
    projection_dim: int | None = knob(None, at_least=1)
    """Width of the embedding: outputs of the last linear layer. null: hidden_size."""
    num_linear_layers: int | None = knob(None, at_least=0)
    """Linear layers on top of the decoder, hidden_size wide but for the last one's outputs. null: one where
    projection_dim is set, else none."""
    linear_place: Literal["before_pooling", "after_pooling"] = "before_pooling"
    """Whether they are applied to each token state or to the pooled vector."""
    linear_activation: Literal["none", "gelu", "tanh"] = "none"
    """After each of them, the last one included."""
    linear_bias: bool = True
    """They have biases."""
    asymmetric: Literal["none", "heads"] = "none"
    """heads: queries and passages go through linear layers of their own, which start out equal; the decoder is
    shared."""
    brackets: Literal["none", "specb", "speca"] = "none"
    """Tokens around each text, put in as ids, attended and pooled. specb: the vocabulary's [ ] around queries and { }
    around passages. speca: four new tokens, which are trained; model.vocab_size must have room for them."""
    side_tokens: bool = False
    """Put a new token in front of each query ([QRY]) and passage ([DOC]); model.vocab_size must have room for two."""
    normalize: bool = True
    """L2-normalise the pooled vector."""
    causal: bool = False
    """Embed with causal attention (GritLM's cccc). false: bidirectional (bbcc)."""
