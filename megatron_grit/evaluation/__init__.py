"""Measures of retrieval and language modelling, with intervals, and their report."""
