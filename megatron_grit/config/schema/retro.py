"""What a decoder reads from a retrieval database."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_grit.config.knob import knob


@dataclass(kw_only=True)
class RetroConfig:
    """Chunked cross-attention to retrieved neighbors (RETRO, arXiv 2112.04426)."""

    num_neighbors: int = knob(0, at_least=0, in_files=False, may_change=True)
    """Neighbors that each chunk reads (k). 0: the model reads none, and has neither encoder nor cross-attention."""
    chunk_length: int = knob(64, at_least=1, in_files=False)
    """Tokens of a chunk; as in the database."""
    retrieved_chunks: int = knob(2, at_least=1, in_files=False, may_change=True)
    """Chunks of a neighbor: itself and what follows it in its document."""
    layers: list[int] | None = knob(None, at_least=0, in_files=False)
    """Layers, from 0, with cross-attention. null: every third from the 9th on, from the 6th on in models of up to 15
    layers, as in Megatron-LM."""
    encoder_layers: int = knob(2, at_least=1, in_files=False)
    """Layers of the neighbor encoder."""
    encoder_hidden_dropout: float = knob(0.0, at_least=0, below=1, in_files=False, in_weights=False)
    """Dropout after attention and feed-forward layers of the encoder. Megatron-LM: 0.1."""
    encoder_attention_dropout: float = knob(0.0, at_least=0, below=1, in_files=False, in_weights=False)
    """Dropout on attention probabilities of the encoder. Megatron-LM: 0.1."""
    encoder_rope: bool = knob(True, in_files=False)
    """Rotary positions in the encoder too, where the decoder has them. Megatron-LM's models have none there."""
    encoder_conditioning: Literal["chunk", "none"] = knob("chunk", in_files=False)
    """The encoder's first layer attends to the chunk that reads the neighbor. none: a neighbor's encoding depends on
    nothing else, so that one that several chunks read is encoded once."""
    gate: float | None = knob(1.0, at_least=0, at_most=1, in_files=False, may_change=True)
    """Factor of what cross-attention adds. 0: neighbors are not read. null: learned, one for each layer, 0 at the
    start, so that training begins with the loss of the model without neighbors."""
    parity: Literal["none", "core"] = knob("none", in_files=False)
    """core: as RetroModel of megatron-core 0.15 computes: no norm at the end of the decoder, no rotary positions in the
    encoder, its residual stream taken after the norm before cross-attention, and zeros attended to where a segment's
    first chunk is short."""
