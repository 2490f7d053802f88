"""Retrieval databases."""
