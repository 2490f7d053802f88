"""Leaf: files, folders, blocks and caches that survive kills; locks, digests, logs and progress."""
