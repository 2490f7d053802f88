"""Chunks and neighbors of a retrieval database, for its readers."""
