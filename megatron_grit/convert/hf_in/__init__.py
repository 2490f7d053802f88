"""Hugging Face models in."""
