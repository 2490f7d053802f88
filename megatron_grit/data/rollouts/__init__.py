"""Files of completions that were sampled and rewarded: read as text, built into indexed files."""
