"""Names of the parameters that a decoder has because it reads neighbors."""

from __future__ import annotations

_PARTS = (".cross_attention.", ".pre_cross_attn_layernorm.", ".encoder.")


def reads(name: str) -> bool:
    """Whether a parameter belongs to cross-attention or to the encoder; the decoder works without it."""
    return any(part in name for part in _PARTS)
