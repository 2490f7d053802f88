"""Log-probabilities of answers under the model that a run starts from."""
