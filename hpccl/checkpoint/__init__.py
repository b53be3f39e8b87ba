"""Saving, finding, loading and pruning checkpoints."""
