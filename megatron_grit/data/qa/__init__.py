"""Questions with answers and contexts: one reader and one set of prompts for training, generation and scoring."""
