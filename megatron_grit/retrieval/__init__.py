"""Retrieval databases: chunks, embeddings, index, neighbors."""
