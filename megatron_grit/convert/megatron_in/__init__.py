"""Checkpoints of Megatron-LM in its older layout, one file a tensor parallel rank."""
