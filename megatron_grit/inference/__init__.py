"""A trained model that encodes and generates."""
