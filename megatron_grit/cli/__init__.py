"""Models: train, convert, plan and run them."""
