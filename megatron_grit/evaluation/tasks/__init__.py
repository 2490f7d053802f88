"""What a model is evaluated on: one file a task, with the same members in each."""
