"""Tokenizers, templates, records and where their spans are."""
