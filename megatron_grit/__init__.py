"""Train one decoder to generate and to embed, at any parallel layout, on megatron-core."""

__version__ = "0.1.0"
