"""Retrieval databases, and questions that are answered with contexts."""
