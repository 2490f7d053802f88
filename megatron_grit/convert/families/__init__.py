"""One table of weights for each model family."""
