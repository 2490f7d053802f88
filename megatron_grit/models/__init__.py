"""The decoder on megatron-core, with the attention mode chosen per forward, and pooling."""
