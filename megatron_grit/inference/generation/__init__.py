"""Answers: decoding with a cache, how tokens are drawn, and text as it comes."""
