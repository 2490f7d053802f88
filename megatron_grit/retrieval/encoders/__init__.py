"""Encoders that embed texts."""
