"""The start-up audit: before the first step, proofs on the run's own model, weights and data that nothing leaks."""
