"""Data on disk, as training reads it."""
