"""Megatron's .bin and .idx files: reading, writing, merging, looking into them."""
