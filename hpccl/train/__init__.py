"""A run: fit, consolidate, evaluate, task by task."""
