"""Near and exact duplicates, found on disk."""
