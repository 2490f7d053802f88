"""Judged collections, rankings of their documents, and measures of rankings."""
