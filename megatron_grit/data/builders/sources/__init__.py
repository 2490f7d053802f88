"""Published data sets as JSONL."""
