"""Gaussian processes that learn task by task: sparse, in dual form, with a memory of the most influential examples."""
