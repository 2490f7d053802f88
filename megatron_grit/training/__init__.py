"""The training step, the loop around it, optimizer, checkpoints and metrics."""
