"""Answers from a folder of documents: read, indexed, searched, and put before the question."""
