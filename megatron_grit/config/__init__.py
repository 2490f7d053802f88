"""Configuration: dataclasses, parsing, cross-checks and presets. Imports no torch."""
