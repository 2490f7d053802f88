"""lm-eval's tasks on our models: the model that its harness asks, suites of tasks, answers that survive a kill."""
