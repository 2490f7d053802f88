"""Segments packed into rows, and the loader that hands them out."""
