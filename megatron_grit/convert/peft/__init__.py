"""PEFT's adapters, both ways."""
