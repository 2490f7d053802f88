"""Sampling completions from an endpoint, and rewarding them."""
