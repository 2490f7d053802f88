"""Faiss indexes: choosing, filling, searching, measuring."""
