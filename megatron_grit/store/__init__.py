"""Leaf: files, folders and caches that survive kills; logs and progress."""
