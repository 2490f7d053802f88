"""Scores of answers to questions: exact match and F1 of words, and ROUGE."""
