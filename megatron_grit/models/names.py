"""Names of the parameters that a decoder of another project does not have."""

from __future__ import annotations

_HEAD = ("embedding_head.", "embedding_pooling.")
_READERS = (".cross_attention.", ".pre_cross_attn_layernorm.", ".encoder.")


def of_head(name: str) -> bool:
    """Whether a parameter belongs to the embedding head or to learned pooling."""
    return name.startswith(_HEAD)


def reads(name: str) -> bool:
    """Whether a parameter belongs to cross-attention or to the encoder of neighbors."""
    return any(part in name for part in _READERS)


def is_added(name: str) -> bool:
    """Whether the decoder computes next tokens without a parameter: any of the above."""
    return of_head(name) or reads(name)
