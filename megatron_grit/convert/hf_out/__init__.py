"""Hugging Face models out."""
