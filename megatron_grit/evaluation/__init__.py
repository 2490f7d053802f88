"""Measures of retrieval and language modelling with confidence intervals, and their report."""
