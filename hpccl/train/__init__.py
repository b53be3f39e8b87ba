"""Training runs: fit, consolidate and evaluate, task by task."""
