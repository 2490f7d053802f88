"""What a build takes: time, disk and memory of each task, from rates that are measured on the corpus in seconds."""
