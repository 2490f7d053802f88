"""JSONL to indexed files: the engine that builds in blocks, and one encoder for each kind of data."""
