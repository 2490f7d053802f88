"""Weights between Hugging Face and megatron-core."""
